"""What benchmarks/boosting.py counts, against published sizes and by hand."""

import pytest

from benchmarks.boosting import flops, main, pipelines

PARTS = ("sd15", "toy-281m enlarger", "sd encoder", "sd decoder")


def test_flops_of_stable_diffusion_are_as_counted_elsewhere(monkeypatch):
    monkeypatch.setenv("KERNELS", "torch")
    found = flops()
    # diffusers UNet2DConditionModel(cross_attention_dim=768), by the same counter.
    assert found["sd15 at 512 px"] == pytest.approx(0.80327344128, rel=1e-9)
    known = {"sd15 at 256 px": 0.180, "sd15 at 1024 px": 4.67}
    known |= {"sd decoder at 1024 px": 10.47, "sd encoder at 1024 px": 4.88}
    for name, value in known.items():
        assert found[name] == pytest.approx(value, rel=5e-3), name
    small, large = (found[f"toy-281m enlarger at {side} px"] for side in (256, 1024))
    assert large == pytest.approx(16 * small, rel=0.05)  # little attention: as the area


def test_a_pipeline_is_the_sum_of_its_calls():
    one = {f"{name} at {side} px": 10.0**i * (side // 256)
           for i, name in enumerate(PARTS) for side in (256, 512, 1024)}  # fmt: skip
    found = pipelines(one)
    assert found["sd15 at 1024 px"] == 49 * 4 + 1000 * 4
    assert found["sd15 at 512 px, enlarged"] == 49 * 2 + 2000 + 10 * 40 + 400 + 4000
    both = 49 + 1000 + (10 * 20 + 200 + 2000) + (10 * 40 + 400 + 4000)
    assert found["sd15 at 256 px, enlarged"] == both


@pytest.mark.parametrize("flags", [["--rounds", "many"], ["--rounds", 1], ["--round", 3]])
def test_a_wrong_flag_is_refused_before_anything_is_measured(user, flags):
    code, out, err = user(main, *flags)
    assert code == 2 and len(err) == 1 and not out and "--round" in err[0], err

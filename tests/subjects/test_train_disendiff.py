"""The training script runs, moves what it should move, and writes what diffusers reads."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gensparse.testing.tiny import tiny_pipeline

SCRIPT = Path(__file__).resolve().parents[2] / "samples" / "train_disendiff.py"


@pytest.mark.parametrize("rank", ["4", "0"])
def test_the_script_trains_two_concepts(
    rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "argv", [str(SCRIPT), "--tiny", "--lr", "0.01", "--rank", rank, "--output", str(tmp_path / "out")]
    )
    with torch.random.fork_rng(devices=[]):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    assert "step 2: diffusion" in printed
    pipe, folder = tiny_pipeline("sd15"), tmp_path / "out"
    first = len(pipe.tokenizer)
    old = pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    for word in ("new1", "new2"):
        pipe.load_textual_inversion(str(folder / f"{word}.safetensors"))
    table = pipe.text_encoder.get_input_embeddings().weight
    assert pipe.tokenizer.convert_tokens_to_ids(["<new1>", "<new2>"]) == [first, first + 1]
    assert torch.equal(table[:first], old)
    start = old[[pipe.tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("cat", "dog")]]
    assert (table[first:] - start).abs().max() > 1e-4
    if rank == "0":
        state = load_file(folder / "keys.safetensors")
        assert state
        assert all(".attn2.to_k." in name or ".attn2.to_v." in name for name in state)
        own = dict(pipe.unet.named_parameters())
        assert all((value - own[name]).abs().max() > 1e-4 for name, value in state.items())
        return
    pipe.load_lora_weights(str(folder), weight_name="lora.safetensors")
    layers = [name for name, _ in pipe.unet.named_parameters() if "lora_B" in name]
    assert layers
    assert all(".attn2.to_k." in name or ".attn2.to_v." in name for name in layers)
    assert all(pipe.unet.get_parameter(name).abs().max() > 0 for name in layers)

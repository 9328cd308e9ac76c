"""Prompts: what a latent prior is told of a text, beside transformers itself."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_latent import folder_of, refused
from torch import Generator, Tensor

import invsolve as iv
from invsolve.operators import Downsample, GaussianNoise
from invsolve.priors.latent import Conditioned, load_latent
from invsolve.samplers.psld import psld

WORDS = ("a", "cat", "dog", "of", "photo")
LENGTH = 7


def text_of(path: Path, width: int = 6) -> tuple[Any, Any]:
    """A tiny CLIP tokenizer and text encoder of random weights, written and given."""
    transformers = pytest.importorskip("transformers")
    tokens: list[str] = ["<|startoftext|>", "<|endoftext|>"]
    letters = sorted(set("".join(WORDS)))
    tokens += letters + [f"{letter}</w>" for letter in letters]
    merges: list[str] = []
    for word in WORDS:
        whole, *rest = [*word[:-1], f"{word[-1]}</w>"]
        for piece in rest:
            merges.append(f"{whole} {piece}")
            whole += piece
            tokens.append(whole)
    folder = path / "tokenizer"
    folder.mkdir(parents=True)
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merged = list(dict.fromkeys(merges))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merged, ""]))
    tokenizer = transformers.CLIPTokenizer.from_pretrained(
        folder, model_max_length=LENGTH
    )
    tokenizer.save_pretrained(folder)
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(4)
        encoder = transformers.CLIPTextModel(config)
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=Generator().manual_seed(5)))
    encoder.eval().save_pretrained(path / "text_encoder")
    return tokenizer, encoder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    folder = tmp_path_factory.mktemp("model")
    folder_of(folder)
    return folder, *text_of(folder)


def told(folder: Path, **options: Any) -> Tensor:
    """The embedding that the network of a loaded prior is told."""
    net = vars(load_latent(folder, **options).prior)["net"]
    assert isinstance(net, Conditioned)
    return net.condition["encoder_hidden_states"]


@pytest.mark.parametrize("prompt", ["a photo of a cat", "dog", "", "a " * 20])
def test_a_prompt_is_told_as_transformers_has_it(
    prompt: str, model: tuple[Path, Any, Any]
) -> None:
    """Padded or cut to the tokenizer's length, the last hidden state of all tokens."""
    folder, tokenizer, encoder = model
    tokens = tokenizer(
        prompt,
        padding="max_length",
        truncation=True,
        max_length=LENGTH,
        return_tensors="pt",
    ).input_ids
    assert tokens.shape == (1, LENGTH)
    with torch.no_grad():
        expected = encoder(tokens)[0][0]
    got = told(folder, condition=prompt)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    if prompt == "":
        torch.testing.assert_close(told(folder), expected, rtol=1e-5, atol=1e-6)


def test_words_are_merged_from_the_folder_s_own_files(
    model: tuple[Path, Any, Any],
) -> None:
    folder, tokenizer, _ = model
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    words = [vocabulary[f"{w}</w>"] for w in ("a", "photo", "of", "a", "cat")]
    assert tokenizer("a photo of a cat").input_ids == [0, *words, 1]


def test_the_network_hears_the_prompt_and_guidance_exaggerates_it(
    model: tuple[Path, Any, Any], generator: Generator
) -> None:
    """∅ is the empty prompt unless another is given; w scales the step away from it."""
    folder, z = model[0], torch.randn(2, 3, 8, 8, generator=generator)

    def at(**options: Any) -> Tensor:
        return load_latent(folder, **options).denoise(z, torch.tensor(1.0))

    cat, dog, nothing = at(condition="cat"), at(condition="dog"), at()
    assert float((cat - dog).abs().max()) > 1e-3
    assert float((cat - nothing).abs().max()) > 1e-3
    for null, base in ((None, nothing), ("dog", dog)):
        guided = at(condition="cat", null=null, guidance=4.0)
        expected = base + 4 * (cat - base)
        torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-4)


def test_a_solve_hears_the_prompt(model: tuple[Path, Any, Any]) -> None:
    y = torch.rand(1, 3, 4, 4, generator=Generator().manual_seed(0))
    given = iv.InverseProblem(y, Downsample(4, (16, 16)), GaussianNoise(0.05))

    def solved(prompt: str, guidance: float) -> Tensor:
        prior = load_latent(model[0], condition=prompt, guidance=guidance)
        options = {"steps": 3, "omega": 0.1, "gamma": 0.01}
        seed = Generator().manual_seed(0)
        return iv.solve(given, prior, psld, generator=seed, **options).samples

    cat = solved("cat", 1.0)
    assert torch.equal(cat, solved("cat", 1.0))
    for other in (solved("dog", 1.0), solved("cat", 5.0)):
        assert float((cat - other).abs().max()) > 1e-4


def test_what_a_prompt_is_refused_for(
    model: tuple[Path, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "unconditional"
    folder_of(folder, conditional=False)
    refused(folder, "unconditional and takes no text: leave the", condition="a cat")
    folder = tmp_path / "without"
    folder_of(folder)
    refused(folder, "needs tokenizer/, which is not in the folder", condition="a cat")
    text_of(folder)
    assert told(folder, condition="a cat").shape == (LENGTH, 6)
    weights = folder / "text_encoder" / "model.safetensors"
    state = load_file(weights)
    key = next(k for k in state if k.endswith("layers.1.mlp.fc1.weight"))
    save_file({k: v for k, v in state.items() if k != key}, weights, {"format": "pt"})
    refused(folder, "its weights lack '.*fc1.weight'", condition="a cat")
    weights.write_bytes(weights.read_bytes()[:100])
    refused(folder, "cannot read its text encoder", condition="a cat")
    weights.unlink()
    refused(folder, "cannot read its text encoder", condition="a cat")
    (folder / "tokenizer" / "vocab.json").unlink()
    (folder / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    refused(folder, "cannot read its text encoder", condition="a cat")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"pip install 'invsolve\[text\]'"
    ) as caught:
        load_latent(model[0], condition="a cat")
    assert "\n" not in str(caught.value)


def test_a_text_encoder_of_another_width_is_refused(tmp_path: Path) -> None:
    folder_of(tmp_path)
    text_of(tmp_path, width=8)
    match = r"must be \(tokens, 6\), .* got \(7, 8\)"
    refused(tmp_path, match, condition="a cat")
    for shape in ((7, 8), (1, 7, 6)):
        wrong = {"encoder_hidden_states": torch.zeros(shape)}
        refused(tmp_path, r"must be \(tokens, 6\)", condition=wrong)

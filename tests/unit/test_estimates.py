"""What `align` prints before it loads anything: estimated memory against what autograd keeps."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from align_world import align_settings, write_scored
from peft import LoraConfig, get_peft_model
from tiny_llava import build_tiny_llava
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, MistralConfig

from mmedpo_ray.align.data import prepare_stage
from mmedpo_ray.align.data.tokenise import COLUMNS
from mmedpo_ray.align.packing.logps import response_logps, use_packed_forward
from mmedpo_ray.align.packing.trees import PackedTrees, TokenSequence, pack
from mmedpo_ray.align.plan import preview as preview_module
from mmedpo_ray.align.plan.dry_run import dry_run
from mmedpo_ray.align.plan.estimates import Geometry, estimate_memory, kept_numbers, logit_bytes
from mmedpo_ray.align.plan.plan import ForwardSize
from mmedpo_ray.align.plan.preview import announce_ahead
from mmedpo_ray.align.settings import AlignConfig
from mmedpo_ray.compat import cluster
from mmedpo_ray.config.tree import Config
from mmedpo_ray.console import console
from mmedpo_ray.errors import UserError
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.manifest import Manifest, write_manifest
from mmedpo_ray.tables.stage_runner import StageRunner

IMAGE_TOKEN, IMAGE_TOKENS, VOCABULARY = 99, 16, 100
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llava(hidden: int, intermediate: int, key_heads: int) -> LlavaConfig:
    """Shapes of a small model, four layers with four heads."""
    text = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=key_heads,
        head_dim=hidden // 4,
        sliding_window=None,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=IMAGE_TOKENS,
    )


def build(settings: LlavaConfig, align: AlignConfig) -> Any:
    torch.manual_seed(0)
    model: Any = LlavaForConditionalGeneration(settings).requires_grad_(False)
    if align.train == "lora":
        pattern = rf".*\.language_model\..*\.({'|'.join(LAYERS)})"
        model = get_peft_model(model, LoraConfig(r=align.lora.rank, target_modules=pattern))
    else:
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    use_packed_forward(model, attention=align.attention)
    return model


def packed_trees(images: int, questions: int) -> PackedTrees:
    """Questions of 20 tokens with two answers of 8 on every image."""
    generator = torch.Generator().manual_seed(0)

    def some(count: int) -> list[int]:
        return torch.randint(3, 90, (count,), generator=generator).tolist()

    sequences = []
    for image in range(images):
        for _ in range(questions):
            prompt = [1, *[IMAGE_TOKEN] * IMAGE_TOKENS, 2, *some(20)]
            sequences += [TokenSequence(prompt, some(8), image) for _ in range(2)]
    return pack(sequences, {"pixel_values": torch.randn(images, 3, 16, 16)}, pad_token_id=0)


def kept_bytes(model: Any, batch: PackedTrees) -> int:
    """Bytes of all that autograd keeps of a forward pass but weights, each storage once."""
    weights = {value.untyped_storage().data_ptr() for value in model.parameters()}
    found: dict[int, int] = {}
    alive = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        alive.append(tensor)
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        response_logps(model, batch)
    return sum(found.values())


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize(("hidden", "intermediate", "key_heads"), [(64, 96, 1), (64, 256, 4), (128, 448, 2)])
@pytest.mark.parametrize(("images", "questions"), [(1, 12), (3, 2)])
def test_expected_activations_are_what_autograd_keeps(
    train: Any, hidden: int, intermediate: int, key_heads: int, images: int, questions: int
) -> None:
    align = align_settings(train=train)
    settings, batch = llava(hidden, intermediate, key_heads), packed_trees(images, questions)
    shape = Geometry.of(settings, align, settings.image_seq_length)
    size = ForwardSize(batch.input_ids.numel(), batch.edge_token.numel(), images)
    kept = kept_bytes(build(settings, align), batch)
    # Of the three numbers a logit, the forward pass keeps one.
    expected = 4 * kept_numbers(shape, align, size) + logit_bytes(shape, align, size) // 3
    assert 0.9 * kept < expected < 1.2 * kept, f"{expected / kept:.3f}"


def test_memory_of_mistral_counts_its_mlp() -> None:
    """Four tensors of 14,336 a token and layer alone are 14 hidden units."""
    shape = Geometry(
        total=1, language=1, layers=1, head=32000 * 4096, tower=1, adapter=1, num_layers=32,
        hidden=4096, intermediate=14336, heads=32, key_heads=8, head_size=128, image_tokens=576,
    )  # fmt: skip
    align = AlignConfig(gradient_checkpointing=False)
    units = kept_numbers(shape, align, ForwardSize(2000, 300, 2)) / (2000 * 4096 * 32)
    assert 22 < units < 28
    again = align.model_copy(update={"gradient_checkpointing": True})
    assert 1 < kept_numbers(shape, again, ForwardSize(2000, 300, 2)) / (2000 * 4096 * 32) < 2
    # More tokens than a chunk has do not make the logits larger.
    assert logit_bytes(shape, align, ForwardSize(9000, 9000, 2)) == 3 * 4 * 2**26


def test_fewer_ranks_hold_more_each() -> None:
    shape = Geometry(
        total=10**9, language=9 * 10**8, layers=8 * 10**8, head=10**6, tower=10**8, adapter=10**7,
        num_layers=2, hidden=64, intermediate=64, heads=4, key_heads=4, head_size=16, image_tokens=16,
    )  # fmt: skip
    few, many = (estimate_memory(shape, AlignConfig(), ForwardSize(100, 10, 1), ranks) for ranks in (2, 8))
    gathered = 2 * 10**9 / 2**30
    assert few.weights - gathered == pytest.approx(4 * (many.weights - gathered)) and few.total > many.total
    alone = estimate_memory(shape, AlignConfig(), ForwardSize(100, 10, 1), 1)
    assert alone.weights == pytest.approx(gathered), "nothing is gathered"


@pytest.mark.parametrize(
    ("strategy", "precision", "train", "a_number", "whole"),
    [
        # Shared by four ranks; then what every rank holds: buckets, and an adapter itself.
        ("zero3", "bf16", "lora", 20 / 4, 2 + 2),
        ("zero2", "bf16", "lora", 20 / 4, 2 * 2 + 2),
        ("zero3", "fp32", "full", 20 / 4, 4),
        ("ddp", "bf16", "full", 18, 0),
        ("ddp", "fp32", "full", 12, 0),
    ],
)
def test_memory_of_what_is_trained(
    strategy: str, precision: str, train: str, a_number: float, whole: int
) -> None:
    shape = Geometry(
        total=10**8, language=9 * 10**7, layers=8 * 10**7, head=10**6, tower=10**7, adapter=10**7,
        num_layers=2, hidden=64, intermediate=64, heads=4, key_heads=4, head_size=16, image_tokens=16,
    )  # fmt: skip
    align = AlignConfig(strategy=strategy, precision=precision, train=train)
    trained = {"lora": 10**7, "full": 9 * 10**7}[train]
    found = estimate_memory(shape, align, ForwardSize(100, 10, 1), 4)
    assert found.trained * 2**30 == pytest.approx(trained * (a_number + whole))


class _StoppedError(Exception):
    pass


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A scored run on a cluster without a GPU, whose preparation ends where a model would be loaded."""
    write_scored(tmp_path, 3)
    config = Config(align=align_settings(num_workers=(1, 4), max_steps=None, epochs=2))
    config.run.folder = str(tmp_path)
    config.model.path = str(build_tiny_llava(tmp_path / "llava"))

    def stop(*_: Any, **__: Any) -> None:
        raise _StoppedError

    monkeypatch.setattr(StageRunner, "write_rows", stop)
    monkeypatch.setattr(cluster, "has_gpu", lambda: False)
    monkeypatch.setattr(cluster, "may_grow", lambda: False)
    monkeypatch.setattr(cluster, "room_for", lambda _: 2)
    return config


def test_the_plan_is_printed_before_a_model_is_loaded(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(_StoppedError):
        prepare_stage.prepare(config)
    line = " ".join(capsys.readouterr().err.split())
    figures = dry_run(config)
    assert "align: 2 steps of 12 pairs on 3 images" in line
    assert f"{figures['tokens_per_epoch']:,} tokens an epoch, {figures['sharing_factor']} times fewer" in line
    assert (
        f"memory of a rank of 1, the fewest of align.num_workers, about {figures['memory_gib_per_rank']:.2f} "
        "GiB" in line
    )


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"num_workers": (1, 3)}, None),
        ({"num_workers": (1, 4)}, r"3 images for 4 ranks, so 25% of .* empty\. Lower align\.num_workers$"),
        (
            {"num_workers": 4, "images_per_step": 2},
            r"2 images for 4 ranks, so 62% of .* or raise align\.images_per_step$",
        ),
        # The pairs of an image are spread over the ranks.
        (
            {"num_workers": 4, "pairs_per_forward": 1},
            r"^[^\n]*so [\d.]+ times the tokens .* Raise align\.pairs_per_forward \(now 1\) as far",
        ),
        (
            {"num_workers": 1, "tokens_per_forward": 64},
            r"^[^\n]*Raise align\.tokens_per_forward \(now 64\) as far as memory allows$",
        ),
    ],
)
def test_work_that_the_settings_waste_is_spoken_of(
    config: Config, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], warning: str | None
) -> None:
    config.align = config.align.model_copy(update=changes)
    dry_run(config)
    found = "\n".join(caplog.messages)
    assert re.search(warning, found) if warning else not found
    assert len(caplog.messages) == (warning is not None)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"beta": 0.25, "loss": "ipo"}, ("dpo: loss ipo, beta 0.25", "LoRA of rank")),
        ({"nll_coefficient": 0.75, "learning_rate": 3e-5}, ("nll_coefficient 0.75", "3e-05")),
        ({"objective": "sft"}, ("sft: the likelihood of the chosen answers",)),
        ({"train": "full"}, ("all weights of the language model",)),
    ],
)
def test_a_dry_run_names_model_and_objective(
    config: Config,
    settings: dict,
    said: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(console, "width", 300)
    config.align = config.align.model_copy(update=settings)
    dry_run(config)
    shown = capsys.readouterr().err
    for words in (*said, config.model.path):
        assert words in shown


def test_of_a_large_table_some_images_are_looked_at(
    config: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preview_module, "_ROWS_LOOKED_AT", 6)
    announce_ahead(config)
    line = " ".join(capsys.readouterr().err.split())
    assert "align: about 2 steps of 12 pairs on 3 images; about" in line
    monkeypatch.setattr(console, "width", 300)
    figures = dry_run(config)
    assert (figures["pairs"], figures["images"], figures["steps"]) == (12, 3, 2)
    assert "about 2 (2 epochs)" in capsys.readouterr().err


def test_images_that_do_not_fill_a_step_say_what_a_rank_of_it_computes(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_scored(Path(config.run.folder), 24)
    config.align = config.align.model_copy(
        update={"images_per_step": 24, "num_workers": 6, "pairs_per_forward": 64, "epochs": 1}
    )
    whole = dry_run(config)
    monkeypatch.setattr(preview_module, "_ROWS_LOOKED_AT", 48)
    part = dry_run(config)
    assert part["share_looked_at"] == 0.5
    for name in ("largest_forward_tokens", "largest_forward_responses", "pairs", "images", "steps"):
        assert part[name] == whole[name], name
    assert part["tokens_per_epoch"] == pytest.approx(whole["tokens_per_epoch"], rel=0.01)
    assert not caplog.messages


@pytest.mark.parametrize("files", [1, 40])
def test_of_a_table_of_many_row_groups_few_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int
) -> None:
    rows = [
        dict.fromkeys(COLUMNS, "")
        | {"image_id": f"i{image:04d}", "pair_id": f"{image}-{pair}", "weight": 1.0}
        for image in range(800)
        for pair in range(5)
    ]
    for number in range(files):
        part = rows[number * 4000 // files : (number + 1) * 4000 // files]
        path = tmp_path / f"part-{number:05d}.parquet"
        pq.write_table(
            schemas.to_table(part, pa.schema([schemas.SCORED.field(name) for name in COLUMNS])),
            path,
            row_group_size=32,
        )
    write_manifest(str(tmp_path), Manifest(stage="score", key="test", rows_out=4000))
    read: list[int] = []
    opened: list[str] = []

    class File(pq.ParquetFile):
        def __init__(self, source: Any) -> None:
            opened.append("")
            super().__init__(source)

        def read_row_group(self, i: int, **options: Any) -> pa.Table:
            found = super().read_row_group(i, **options)
            read.append(len(found))
            return found

    whole, share = preview_module._read_scored(str(tmp_path), 4000)
    assert (len(whole), share) == (4000, 1.0)
    monkeypatch.setattr(preview_module, "_IDS_LOOKED_AT", 1000)
    monkeypatch.setattr(preview_module.pq, "ParquetFile", File)
    monkeypatch.setattr(preview_module.storage, "dataset", None)
    found, share = preview_module._read_scored(str(tmp_path), 640)
    assert 0.5 * 640 < len(found) <= sum(read) <= 640 and len(opened) <= 16
    assert share == len(found) / 4000
    # Whole images, of all parts of the table.
    images = found["image_id"].to_pylist()
    assert set(Counter(images).values()) == {5}
    assert {image[:3] for image in images} == {f"i0{number}" for number in range(8)}


def test_a_gpu_that_is_not_there_is_said_at_once(config: Config) -> None:
    """The actors that compute the reference would wait for it for ever."""
    config.align = config.align.model_copy(update={"use_gpu": True})
    with pytest.raises(UserError, match=r"align\.use_gpu is true but the cluster has no GPU"):
        prepare_stage.prepare(config)
    config.align = config.align.model_copy(update={"use_gpu": None, "num_workers": 3})
    with pytest.raises(UserError, match="at least 3 ranks of 1 CPU each"):
        prepare_stage.prepare(config)

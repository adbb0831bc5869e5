"""The table `candidates`: answers of the target model to the train questions, sampled with vLLM.

One engine per actor, in the actor's own process. The prompts are token for token those of training; the
questions of an image are neighbours, so the engine processes an image once and computes its prefix once. The
stages of ``ray.data.llm`` would carry the decoded image in every row, write the prompt of a row that fails
beside it, and lose the reason why it was dropped.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from PIL import Image

from mmedpo_ray.compat.cluster import MODEL_RESTARTS, has_gpu
from mmedpo_ray.config.tree import Config
from mmedpo_ray.curate.seeds import stable_seed
from mmedpo_ray.io import images as image_files
from mmedpo_ray.models.fingerprint import model_fingerprint
from mmedpo_ray.models.loading import load_processor, resolve_model
from mmedpo_ray.models.prompts import PromptWriter
from mmedpo_ray.models.vllm_engine import EngineSettings, engine_settings, start_engine
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.id_set import IdSet
from mmedpo_ray.tables.run_folder import RunFolder
from mmedpo_ray.tables.schemas import DROP_DETAIL, DROP_REASON
from mmedpo_ray.tables.stage_runner import Manifest, StageRunner

# The columns of a sample that sampling needs.
COLUMNS = ("sample_id", "image_id", "image_uri", "question")
# Questions whose prompts are kept: candidates of a sample are neighbours, and data sets ask the same of many
# images.
_CACHED_PROMPTS = 4_096


def sample_candidates(config: Config, samples: pa.Table) -> Manifest:
    """Samples ``curate.text.num_candidates`` answers to every train question.

    Args:
        config: all settings.
        samples: the train rows of `samples`, questions of an image together.

    Raises:
        UserError: the model cannot be used, or every question was dropped.
    """
    run = RunFolder(config.run.folder)
    text = config.curate.text
    settings = [
        {"num_candidates": text.num_candidates, "top_p": text.top_p},
        {"temperatures": [text.temperature_of(number) for number in range(text.num_candidates)]},
        {"max_tokens": text.max_tokens, "max_model_len": config.model.engine.max_model_len},
        config.model.path,
        model_fingerprint(config.model.path),
        config.run.seed,
    ]
    stage = StageRunner("candidates", run.candidates, config, settings=settings, inputs=[run.samples])
    if (manifest := stage.finished()) is not None:
        return manifest
    planned = plan(samples.select(COLUMNS), text.num_candidates)
    engine = engine_settings(config.model.engine, has_gpu=has_gpu(), model=resolve_model(config.model.path))

    def build(done: IdSet) -> ray.data.Dataset | None:
        remaining = done.leave_out(planned, "candidate_id")
        if remaining.num_rows == 0:
            return None
        rows = config.model.engine.batch_rows
        blocks = [
            remaining.slice(start, rows).combine_chunks() for start in range(0, remaining.num_rows, rows)
        ]
        return ray.data.from_blocks(blocks).map_batches(
            CandidateSampler,
            fn_constructor_args=(config, engine),
            batch_format="pyarrow",
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=min(config.model.engine.replicas, len(blocks))),
            num_cpus=engine.num_cpus,
            num_gpus=engine.num_gpus,
            **MODEL_RESTARTS,
            runtime_env={"env_vars": {**engine.env, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}},
        )

    return stage.write_rows(
        build,
        schema=schemas.CANDIDATES,
        id_column="candidate_id",
        total=planned.num_rows,
        extra=_count,
        extra_columns=["sample_id", "candidate", "num_tokens"],
        retry_reasons=(image_files.UNREADABLE,),
    )


def plan(samples: pa.Table, num_candidates: int) -> pa.Table:
    """One row per candidate: ``candidate_id``, ``k`` (from 0) and the sample's columns, in sample order."""
    repeated = samples.take(pa.array(np.repeat(np.arange(samples.num_rows), num_candidates)))
    numbers = pa.array(np.tile(np.arange(num_candidates), samples.num_rows), pa.int64())
    ids = pc.binary_join_element_wise(repeated["sample_id"], pc.cast(numbers, pa.string()), "#")
    return repeated.append_column("k", numbers).append_column("candidate_id", ids)


class CandidateSampler:
    """Ray Data actor around a vLLM engine: planned candidates → rows of `candidates`.

    Args:
        config: all settings.
        engine: the engine's arguments.
    """

    def __init__(self, config: Config, engine: EngineSettings) -> None:
        import vllm

        self._config = config
        self._text = config.curate.text
        self._vllm = vllm
        self._writer = PromptWriter(load_processor(config.model.path))
        arguments = dict(engine.engine_kwargs)
        if config.model.engine.tensor_parallel_size > 1:
            # The actor holds all its GPUs itself; a Ray executor would ask for them once more.
            arguments["distributed_executor_backend"] = "mp"
        self._loader = image_files.ImageLoader(config.data.max_pixels)
        self._max_model_len = arguments["max_model_len"]
        self._engine: Any = start_engine(resolve_model(config.model.path), arguments)
        self._prompt = functools.lru_cache(_CACHED_PROMPTS)(self._write_prompt)

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.to_pylist()
        results: list[dict[str, Any]] = []
        asked: list[dict[str, Any]] = []
        requests: list[dict[str, Any]] = []
        decoded: dict[str, Image.Image | image_files.ImageError] = {}
        for row in rows:
            ids, length, _ = self._prompt(row["question"])
            image = self._image(row["image_uri"], decoded)
            if isinstance(image, image_files.ImageError):
                results.append(_dropped(row, image.reason, image.detail))
            elif ids is None:
                results.append(_dropped(row, "image_placeholder_in_question"))
            elif (
                length + self._writer.count_image_tokens(image.size) + self._text.max_tokens
                > self._max_model_len
            ):
                results.append(_dropped(row, "prompt_too_long"))
            else:
                asked.append(row)
                requests.append(
                    {
                        "prompt_token_ids": ids,
                        "multi_modal_data": {"image": image},
                        # So vLLM does not hash the pixels of an image for each of its questions.
                        "multi_modal_uuids": {"image": [row["image_uri"]]},
                    }
                )
        if requests:
            parameters = [self._sampling(row) for row in asked]
            outputs = self._engine.generate(requests, parameters, use_tqdm=False)
            for row, parameter, output in zip(asked, parameters, outputs, strict=True):
                answer = output.outputs[0]
                results.append(
                    {
                        "candidate_id": row["candidate_id"],
                        "sample_id": row["sample_id"],
                        "candidate": answer.text.strip(),
                        "generator": self._config.model.path,
                        "prompt_sha256": self._prompt(row["question"])[2],
                        "seed": parameter.seed,
                        "temperature": parameter.temperature,
                        "num_tokens": len(answer.token_ids),
                    }
                )
        return schemas.to_table(results, schemas.with_drop_columns(schemas.CANDIDATES))

    def _sampling(self, row: dict[str, Any]) -> Any:
        return self._vllm.SamplingParams(
            temperature=self._text.temperature_of(row["k"]),
            top_p=self._text.top_p,
            max_tokens=self._text.max_tokens,
            seed=stable_seed(self._config.run.seed, row["candidate_id"]),
        )

    def _image(
        self, uri: str, decoded: dict[str, Image.Image | image_files.ImageError]
    ) -> Image.Image | image_files.ImageError:
        if uri not in decoded:
            loaded = self._loader.load(uri)
            decoded[uri] = image_files.to_rgb(loaded) if isinstance(loaded, Image.Image) else loaded
        return decoded[uri]

    def _write_prompt(self, question: str) -> tuple[list[int] | None, int, str]:
        """Token ids with one id for the image (vLLM expands it), length without the image, and hash."""
        ids, narrow = self._writer.engine_prompt(question), self._writer.narrow_prompt(question)
        if ids is None or narrow is None:
            return None, 0, ""
        text = self._writer.prompt_text(question)
        return ids, len(narrow) - 1, hashlib.sha256(text.encode()).hexdigest()


def _dropped(row: dict[str, Any], reason: str, detail: str | None = None) -> dict[str, Any]:
    return {
        "candidate_id": row["candidate_id"],
        "sample_id": row["sample_id"],
        DROP_REASON: reason,
        DROP_DETAIL: detail or row["sample_id"],
    }


def _count(candidates: pa.Table) -> dict[str, Any]:
    return {
        "questions": pc.count_distinct(candidates["sample_id"]).as_py(),
        "mean_tokens": round(pc.mean(candidates["num_tokens"]).as_py() or 0.0, 2),
        "empty": pc.sum(pc.equal(candidates["candidate"], "")).as_py() or 0,
    }

"""A judge that is any chat model, run by vLLM with structured output. Prompt, form and safety: ``prompt.py``.

With ``scoring: expectation`` the score is read from the model's log-probabilities instead of its words. vLLM
returns them after the constraint on the answer was applied (``logprobs_mode: raw_logprobs`` means "before
temperature and the like", not "before the grammar"; seen on 0.32), so the letters of the scale are all there
and sum to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from mmedpo_ray.errors import UserError
from mmedpo_ray.judge.agents import prompt
from mmedpo_ray.judge.agents.base import Agent, AgentConfig, Case, Judgement, Refusal
from mmedpo_ray.models.settings import EngineConfig
from mmedpo_ray.models.vllm_engine import EngineSettings, engine_settings

# Rows of a batch, at least, as a multiple of those decoded together: at the end of each batch the engine
# waits for its last answers, which differ in length.
_ROUNDS = 8
_TOO_LONG = Refusal("judge_prompt_too_long")


class VllmAgentConfig(AgentConfig):
    """A judge that is any chat model, run by vLLM with structured output."""

    kind: Literal["vllm"] = "vllm"
    model: str = Field(description="local folder or hub name of a chat model")
    temperature: float = Field(0.0, ge=0)
    max_tokens: int = Field(160, ge=16)
    scoring: Literal["choice", "expectation"] = Field(
        "choice",
        description="choice: the score the model writes; "
        "expectation: mean of the scores under its log-probabilities",
    )
    engine: EngineConfig = EngineConfig()


class VllmAgent(Agent):
    """A chat model on a vLLM engine in this process: a Ray actor with the resources of :meth:`map_options`.

    Raises:
        UserError: the model's tokenizer has no chat template.
    """

    settings_class = VllmAgentConfig

    def __init__(self, settings: VllmAgentConfig, secret: str | None = None) -> None:  # noqa: ARG002
        import ray
        from transformers import AutoTokenizer
        from vllm import LLM

        self._settings = settings
        self._tokenizer: Any = AutoTokenizer.from_pretrained(settings.model)
        if not self._tokenizer.chat_template:
            raise UserError(
                f"score.agents: {settings.model} has no chat template, so it cannot judge. Use an "
                "instruction-tuned model."
            )
        engine = _engine(settings, has_gpu=bool(ray.get_gpu_ids()))
        self._llm = LLM(model=settings.model, **engine_arguments(engine))
        self._longest = engine.engine_kwargs["max_model_len"]

    @classmethod
    def map_options(cls, settings: VllmAgentConfig, *, data_cpus: float, has_gpu: bool) -> dict[str, Any]:  # noqa: ARG003
        """A pool of actors, one engine each.

        Raises:
            UserError: the model folder or the engine settings do not fit.
        """
        from mmedpo_ray.compat.cluster import MODEL_RESTARTS

        engine = _engine(settings, has_gpu=has_gpu)
        longest = engine.engine_kwargs["max_model_len"]
        if longest - settings.max_tokens < 1:
            raise UserError(
                f"score.agents, {settings.name}: max_tokens={settings.max_tokens} leaves no room for a "
                f"prompt in {longest} tokens. Lower max_tokens or raise engine.max_model_len."
            )
        return {
            "concurrency": settings.engine.replicas,
            "batch_size": max(settings.engine.batch_rows, _ROUNDS * settings.engine.max_num_seqs),
            "num_cpus": engine.num_cpus,
            "num_gpus": engine.num_gpus,
            **MODEL_RESTARTS,
            # The engine lives in the actor itself: it starts faster and ends with it.
            "runtime_env": {"env_vars": {**engine.env, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}},
        }

    @classmethod
    def key(cls, settings: VllmAgentConfig) -> list[Any]:
        """Model, sampling, numerics and prompt; not how many engines run how large batches."""
        chosen = settings.model_dump(mode="json", exclude={"engine"})
        engine = settings.engine
        return [chosen, engine.dtype, engine.max_model_len, engine.extra, prompt.fingerprint()]

    def judge(self, cases: Sequence[Case]) -> list[Judgement | Refusal]:
        """Judges a batch of cases; too long prompts and invalid answers become refusals."""
        if self._settings.scoring == "expectation":
            return self._judge_by_expectation(cases)
        limit = self._settings.max_tokens
        conversations = [prompt.messages(case) for case in cases]
        forms = [
            self._form(prompt.schema(case, limit), conversation)
            for case, conversation in zip(cases, conversations, strict=True)
        ]
        outputs = self._generate(conversations, forms)
        return [
            _TOO_LONG if output is None else prompt.parse(output.text, case, self._settings.name)
            for case, output in zip(cases, outputs, strict=True)
        ]

    def _judge_by_expectation(self, cases: Sequence[Case]) -> list[Judgement | Refusal]:
        """Two turns: the rationale, then one letter, whose log-probabilities are read."""
        conversations = [prompt.rationale_messages(case) for case in cases]
        schema = prompt.rationale_schema(self._settings.max_tokens)
        outputs = self._generate(
            conversations, [self._form(schema, conversation) for conversation in conversations]
        )
        answers: list[Judgement | Refusal] = [_TOO_LONG] * len(cases)
        asked: list[tuple[int, str]] = []
        for index, output in enumerate(outputs):
            if output is None:
                continue
            rationale = prompt.parse_rationale(output.text)
            if rationale is None:
                answers[index] = Refusal(prompt.UNREADABLE)
            else:
                asked.append((index, rationale))
        outputs = self._generate(
            [prompt.letter_messages(cases[index], rationale) for index, rationale in asked],
            [letter_sampling()] * len(asked),
        )
        for (index, rationale), output in zip(asked, outputs, strict=True):
            if output is not None:
                answers[index] = self._read_letter(output, rationale, cases[index])
        return answers

    def _read_letter(self, output: Any, rationale: str, case: Case) -> Judgement | Refusal:
        tokens = output.logprobs[0].values() if output.logprobs else ()
        view = prompt.expectation((token.decoded_token or "", token.logprob) for token in tokens)
        if view is None:
            return Refusal(prompt.UNREADABLE)
        return prompt.by_expectation(view, rationale, case, self._settings.name)

    def _generate(self, conversations: list[list[dict[str, str]]], parameters: list[Any]) -> list[Any]:
        """The engine's outputs in order; ``None`` where prompt and answer do not fit into the model."""
        from vllm import TokensPrompt

        if not conversations:
            return []
        prompts = self._tokenizer.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        asked = [
            index
            for index, tokens in enumerate(prompts)
            if len(tokens) + parameters[index].max_tokens <= self._longest
        ]
        answers = self._llm.generate(
            [TokensPrompt(prompt_token_ids=prompts[index]) for index in asked],
            [parameters[index] for index in asked],
            use_tqdm=False,
        )
        outputs: list[Any] = [None] * len(conversations)
        for index, answer in zip(asked, answers, strict=True):
            outputs[index] = answer.outputs[0]
        return outputs

    def _form(self, schema: dict[str, Any], conversation: list[dict[str, str]]) -> Any:
        temperature = self._settings.temperature
        seed = prompt.seed(conversation) if temperature else None
        return _sampling(
            {"json": schema}, temperature=temperature, max_tokens=self._settings.max_tokens, seed=seed
        )


def engine_arguments(engine: EngineSettings) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` for a judge, without the model."""
    # Free whitespace would let a model fill its tokens with blanks. vLLM 0.32 reads this from the engine
    # only, not from the request, and only for a named backend.
    output = {"backend": "xgrammar", "disable_any_whitespace": True}
    return {"structured_outputs_config": output, **engine.engine_kwargs}


def _engine(settings: VllmAgentConfig, has_gpu: bool) -> EngineSettings:
    return engine_settings(settings.engine, has_gpu=has_gpu, model=settings.model)


def letter_sampling() -> Any:
    """Sampling parameters of one letter of the scale, with the log-probabilities of all."""
    letters = prompt.LETTERS
    return _sampling({"choice": list(letters)}, temperature=0.0, max_tokens=1, logprobs=len(letters))


def _sampling(structure: dict[str, Any], **options: Any) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    return SamplingParams(structured_outputs=StructuredOutputsParams(**structure), **options)

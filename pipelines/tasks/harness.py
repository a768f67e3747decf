"""A model with memory as lm-evaluation-harness sees one: texts of any length in one stream, nothing truncated."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipelines.config import InputError
from pipelines.data.tokenise import Tokenizer
from pipelines.tasks.continuations import Asked, Writing, score, write
from rmt_core import RecurrentModel, Sampling

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM

_MAX_NEW_TOKENS = 256  # where a request does not say
_KNOWN = {"until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", "top_p", "num_beams"}  # of a request


def as_harness_model(model: RecurrentModel, tokenizer: Tokenizer, batch_size: int = 8) -> "TemplateLM":
    """The adapter for `lm_eval.simple_evaluate(model=...)`. InputError for a tokenizer without an end token.

    The end token is what a text begins behind where a task gives no context: it predicts the first token.
    """
    from lm_eval.api.model import TemplateLM

    if tokenizer.eos_id is None:
        raise InputError("the model's tokenizer has no end token, behind which texts without a context begin")
    end = tokenizer.eos_id

    class RecurrentLM(TemplateLM):
        """Requests of the harness, answered through the memory."""

        @property
        def eot_token_id(self) -> int:
            return end

        @property
        def tokenizer_name(self) -> str:
            return tokenizer.fingerprint

        def tok_encode(self, string: str, **_: Any) -> list[int]:
            return tokenizer.encode(string).tolist()

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            asked = [Asked(context or [end], continuation) for _, context, continuation in requests]
            return [(one.log_likelihood, one.is_greedy) for one in score(model, asked, batch_size)]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            asked = [Asked([end], self.tok_encode(request.args[0])) for request in requests]
            return [one.log_likelihood for one in score(model, asked, batch_size)]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            found = [""] * len(requests)
            groups: dict[Writing, list[int]] = {}
            for number, request in enumerate(requests):
                groups.setdefault(writing_of(request.args[1]), []).append(number)
            for writing, numbers in groups.items():
                contexts = [self.tok_encode(requests[number].args[0]) or [end] for number in numbers]
                for number, text in zip(numbers, write(model, tokenizer, contexts, writing, batch_size), strict=True):
                    found[number] = text
            return found

    return RecurrentLM()


def writing_of(settings: dict[str, Any]) -> Writing:
    """How a request of the harness wants its continuation written. InputError for what is not served."""
    unknown = [name for name in settings if name not in _KNOWN]
    if unknown:
        raise InputError(f"a task asks to write with {unknown[0]!r}, which is not served; known are {sorted(_KNOWN)}")
    until = settings.get("until") or []
    stops = (until,) if isinstance(until, str) else until
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) or stop is None for stop in stops):
        raise InputError(f"a task asks to write until {until!r}; it must be a text or a list of texts")
    limit = "max_gen_toks" if "max_gen_toks" in settings else "max_new_tokens"
    most = settings.get(limit, _MAX_NEW_TOKENS)
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise InputError(f"a task asks to write {limit} {most!r}; it must be a whole number of at least 1")
    if settings.get("num_beams", 1) != 1:
        raise InputError(f"a task asks for num_beams {settings['num_beams']!r}; beams are not searched: it must be 1")
    if settings.get("do_sample") not in (None, False, True):
        raise InputError(f"a task asks for do_sample {settings['do_sample']!r}; it must be true or false")
    try:
        temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0
        sampling = Sampling(temperature, float(settings.get("top_p", 1.0)))
    except (TypeError, ValueError) as error:
        raise InputError(f"a task asks to write with {settings}: {error}") from None
    return Writing(most, tuple(stop for stop in stops if stop), sampling)

"""What a run reads: the segments of its data, and the lanes of all its workers."""

import logging
import typing

from pipelines import storage
from pipelines.config import InputError
from pipelines.data import lanes as data
from pipelines.data.books import BookStore
from pipelines.data.mixture import Mixture, Store
from pipelines.data.sampling import SampleLane, SampleSource
from pipelines.data.store import SegmentStore
from pipelines.data.task_lanes import Choice, TaskLane, TaskSource, store_prose
from pipelines.data.tokenise import Tokenizer, load_tokenizer
from pipelines.tasks import TASKS, texts
from pipelines.tasks.questions import QuestionTask
from pipelines.training.settings import TrainConfig

log = logging.getLogger(__name__)


def open_store(config: TrainConfig) -> Store:
    """The segments to train on; InputError where they are of another tokenizer than the model's."""
    stores = [SegmentStore(uri) for uri in config.data or []]
    store: Store
    if not stores:
        store = BookStore(config.segment_len)
    elif len(stores) == 1:
        store = stores[0]
    else:
        store = Mixture(stores, config.dataset.weights)
    directory, field = config.model.directory, config.model.directory_field
    if directory is not None and not storage.exists(storage.join(directory, "tokenizer.json")):
        log.warning(
            "%s %s brings no tokenizer.json: whether the data was made with its tokenizer is not checked",
            field,
            directory,
        )
    elif directory is not None:
        fingerprint = load_tokenizer(directory).fingerprint
        if fingerprint != store.tokenizer_fingerprint:
            raise InputError(
                f"{field} {directory} brings tokenizer {fingerprint[:16]}, the data was made with "
                f"{store.tokenizer_fingerprint[:16]}; prepare the data with --tokenizer {directory}"
            )
    return store


def make_lanes(config: TrainConfig, store: Store, tokenizer: Tokenizer) -> list[data.Lane]:
    """All lanes of the run: first those that read texts of tasks, then those that read documents."""
    if not store.manifest:
        raise InputError("the data holds no documents; prepare some")
    num_asked = config.num_task_lanes
    settings = config.dataset
    lanes: list[data.Lane] = []
    if num_asked:
        asked = task_source(config, store, tokenizer)
        lanes += [TaskLane(asked, number) for number in range(num_asked)]
    num_documents = config.batch_size - num_asked
    if num_documents and settings.mode == "sample":
        samples = SampleSource(store, seed=config.seed, eos_id=tokenizer.eos_id)
        lanes += [SampleLane(samples, number) for number in range(num_documents)]
    elif num_documents:
        source = data.DocumentSource(
            store, num_documents, seed=config.seed, eos_id=tokenizer.eos_id, piece_segments=settings.piece_segments
        )
        source.lane(0, 0)
        lanes += [data.DocumentLane(source, number, data.Cursor()) for number in range(num_documents)]
    return lanes


def task_source(config: TrainConfig, store: Store, tokenizer: Tokenizer) -> TaskSource:
    """The texts of tasks that a run reads; InputError where they do not fit its windows."""
    prose, noise = store_prose(store), texts.noise(tokenizer)
    choices = [
        Choice(
            settings.task,
            typing.cast(QuestionTask, TASKS[settings.task]).make,
            noise if settings.background == "noise" else prose,
            settings.weight,
            settings.depths,
        )
        for settings in config.dataset.tasks
    ]
    source = TaskSource(
        tokenizer,
        choices,
        store.segment_len,
        seed=config.seed,
        text_weight=config.dataset.task_text_weight,
        answer_weight=config.dataset.task_answer_weight,
        fresh_fraction=config.dataset.task_fresh_fraction,
    )
    for num_segments in sorted({config.curriculum.shortest, max(config.curriculum.num_segments)}):
        source.check(num_segments)
    return source

"""One training run through what happens to runs on spot nodes, each fault a test that goes on from the last.

What each costs is printed; by hand: `python -m pytest tests/scenarios/test_training_faults.py -m scenario -s`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rmt_core
from tests.scenarios.site import Site, wait_until

pytestmark = [pytest.mark.scenario, pytest.mark.ray]

NUM_STEPS, EVERY = 1000, 20
SETTINGS = [
    *["--batch-size", "6", "--segment-len", "64", "model.width", "96", "model.feed_forward_width", "256"],
    *["curriculum.num_segments", "4", "curriculum.steps", str(NUM_STEPS), "curriculum.vary", "no"],
    *["curriculum.advance_below", "none", "gradient.mode", "replay", "workers.zero_stage", "2"],
    *["workers.num_workers", "1,2", "workers.resize_every_s", "3", "workers.max_failures", "4"],
    *["report.log_every", "1", "report.checkpoint_every", str(EVERY), "dataset.piece_segments", "16"],
]


class Story:
    """The run and its nodes."""

    def __init__(self, folder: Path) -> None:
        self.site = Site(folder, SETTINGS)
        self.nodes: list[Any] = [self.site.add_node(), self.site.add_node()]
        self.site.start()

    def goes_on(self, num_workers: int, known: int) -> None:
        """With so many workers, after `known` starts, and no more was lost than the steps since a checkpoint."""
        start = self.site.wait_for_start(known, num_workers)
        print(f"\n{self.site.reached} steps were done; {num_workers} workers go on from {start.step}")
        assert 0 <= self.site.reached - start.step <= EVERY
        self.site.wait_for_progress()


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    story = Story(tmp_path_factory.mktemp("faults"))
    try:
        assert story.site.wait_for_start(0, num_workers=2).step == 0
        story.site.wait_for_progress()
        yield story
    finally:
        story.site.close()


def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint(story: Story) -> None:
    known = len(story.site.starts)
    story.site.worker_processes(story.nodes[1])[0].kill()
    story.goes_on(2, known)


def test_a_lost_node_leaves_fewer_workers(story: Story) -> None:
    known = len(story.site.starts)
    story.site.remove_node(story.nodes.pop())
    story.goes_on(1, known)


def test_a_new_node_brings_more_workers(story: Story) -> None:
    known = len(story.site.starts)
    story.nodes.append(story.site.add_node())
    story.goes_on(2, known)


def test_an_announced_loss_is_saved_in_time(story: Story) -> None:
    """A checkpoint out of turn stands while the node is still there; the run needs none of its failures to go on."""
    known, node = len(story.site.starts), story.nodes.pop()
    story.site.announce(node, seconds=12.0)
    step = story.site.wait_for_announcement()
    wait_until(lambda: story.site.saved >= step, f"the checkpoint of step {step}")
    assert len(story.site.starts) == known
    story.goes_on(1, known)
    story.site.remove_node(node)


def test_the_command_given_again_goes_on_after_its_driver_was_killed(story: Story) -> None:
    """Of three nodes: two workers' places are kept for the dead run, by Ray's coordinator, for three minutes."""
    known = len(story.site.starts)
    story.site.kill_driver()
    story.nodes += [story.site.add_node(), story.site.add_node()]
    story.site.start()
    story.goes_on(1, known)


def test_a_new_cluster_goes_on_after_its_head_was_lost(story: Story) -> None:
    site, known = story.site, len(story.site.starts)
    site.lose_head()
    assert site.exit_code() not in (0, 2)
    site.open()
    site.add_node()
    site.start()
    story.goes_on(1, known)


def test_the_run_ends_as_if_nothing_had_happened(story: Story) -> None:
    assert story.site.exit_code() == 0, story.site.log[-5000:]
    assert story.site.steps == list(range(1, NUM_STEPS + 1))  # no step missing or told twice
    rmt_core.load(story.site.run / "model")
    checkpoints = [path for path in story.site.run.glob("checkpoint_*") if path.is_dir()]
    assert len(checkpoints) == 2  # left-overs of killed workers are gone

"""Rewards, and grading in processes that can be killed.

    with Grader(REWARDS["answer"]) as grader:
        [(is_equal, failed)] = grader(["... so it is \\boxed{18}"], ["18"])
        grader.grade(samples, references)            # fills in the reward of each sample

Model output can hang any algebra system (`9^{9^{9^{9}}}`) in code that no exception interrupts. So
answers are compared in workers: equality.py, run as a script. The kernel ends a worker when an
answer takes too long. Whatever ends it, only that answer is lost, and another worker takes its
place. A worker shares no thread, lock or GPU with the trainer, and ends with it.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from subprocess import PIPE, Popen

from answers import extract_boxed, is_no_answer
from data import Sample
from run import InputError, RunError

WORKER = Path(__file__).resolve().with_name("equality.py")


@dataclass(frozen=True)
class Reward:
    """What a sample is paid, --reward."""

    # Of a Sample and whether its answer equals the reference, to 0 or 1; it runs in the trainer.
    function: Callable = lambda sample, is_equal: is_equal
    # Equal by Math-Verify as it comes, from the whole response, not by equality.py from its box.
    as_it_comes: bool = False


REWARDS = {
    "answer": Reward(),
    "math-verify": Reward(as_it_comes=True),
}


def add_reward_flags(parser: argparse.ArgumentParser) -> None:
    """What is paid, in training and in evaluations."""
    add = parser.add_argument_group("reward").add_argument
    add("--reward", choices=REWARDS, default="answer",
        help="answer: 1 if the last box equals the reference, else 0; math-verify: the same by "
        "Math-Verify as it comes, which graded published figures")


class Grader(AbstractContextManager):
    """Grades samples. To be used as a context manager.

    workers: by default this rank's share of the cores that it may use; they start when needed.
    deadline: seconds for one answer.
    """

    def __init__(self, reward: Reward = REWARDS["answer"], workers: int | None = None,
                 deadline: float = 10.0):
        share = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self.threads = ThreadPoolExecutor(workers or share)  # each waits for one worker
        self.reward, self.deadline, self.idle = reward, deadline, []

    def grade(self, samples: list[Sample], references: list[str]) -> None:
        """Fill in `reward` and `grader_failed` of each sample. InputError for rewards but 0, 1."""
        verdicts = self([sample.text for sample in samples], references)
        for sample, (is_equal, failed) in zip(samples, verdicts):
            reward = self.reward.function(sample, is_equal)
            if reward not in (0, 1):  # p is the probability of a 1
                raise InputError(f"--reward: gave {reward} to a sample; it must be 0 or 1")
            sample.reward, sample.grader_failed = float(reward), failed

    def __call__(self, responses: list[str], references: list[str]) -> list[tuple[bool, bool]]:
        """(is_equal, failed) of each response: whether its answer equals the reference.

        failed: it overran the deadline or its worker died; it counts as unequal. Raises RunError
        if no worker can be started.
        """
        read = str if self.reward.as_it_comes else extract_boxed
        given = map(read, responses)
        known = ["" if is_no_answer(answer) else answer for answer in references]
        pairs = list(zip(given, known, strict=True))
        # Equal texts are equal answers, and equal pairs need to be judged once.
        verdicts = {(text, answer): (text == answer != "", False) for text, answer in pairs}
        unequal = [pair for pair, (is_equal, _) in verdicts.items() if all(pair) and not is_equal]
        verdicts |= zip(unequal, self.threads.map(self._judge, unequal))
        return [verdicts[pair] for pair in pairs]

    def _judge(self, pair: tuple[str, str]) -> tuple[bool, bool]:
        worker = self._idle_worker()
        try:
            print(json.dumps(pair), file=worker.stdin, flush=True)
        except BrokenPipeError:  # killed while it was idle
            return self._judge(pair)
        if not connection.wait([worker.stdout], timeout=2 * self.deadline):
            worker.kill()  # the kernel should have ended it: it was stopped
        if not (reply := worker.stdout.readline()):
            return False, True  # it has died
        self.idle.append(worker)
        return tuple(json.loads(reply))

    def _idle_worker(self) -> Popen:
        with suppress(IndexError):
            return self.idle.pop()
        judge = "as_it_comes" if self.reward.as_it_comes else "equivalent"
        command = [sys.executable, str(WORKER), judge, str(self.deadline)]
        with suppress(OSError):  # said below. A session of its own: Ctrl-C is for the trainer
            worker = Popen(command, stdin=PIPE, stdout=PIPE, text=True, start_new_session=True)
            if worker.stdout.readline():  # "ready"
                return worker
        raise RunError("the grader cannot be started, so no response can be graded: out of memory?")

    def __exit__(self, *exception) -> None:
        self.threads.shutdown(cancel_futures=True)
        for worker in self.idle:
            worker.kill()
            worker.communicate()

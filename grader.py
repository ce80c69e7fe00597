"""Grading in processes that can be killed.

    with Grader(workers=2) as grader:
        [(score, failed)] = grader(["... so it is \\boxed{18}"], ["18"])

Model output can hang any algebra system (`9^{9^{9^{9}}}`) in code that no exception interrupts. So
answers are compared in workers: answers.py, run as a script. The kernel ends a worker when an
answer takes too long. Whatever ends it, only that answer is lost, and another worker takes its
place. A worker shares no thread, lock or GPU with the trainer, and ends with it.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from multiprocessing import connection
from subprocess import PIPE, Popen

import answers
from answers import extract_boxed
from run import RunError


class Grader(AbstractContextManager):
    """Scores responses. To be used as a context manager.

    workers: by default this rank's share of the machine's cores; they start when they are needed.
    deadline: seconds for one answer.
    """

    def __init__(self, workers: int | None = None, deadline: float = 10.0):
        share = max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self.threads = ThreadPoolExecutor(workers or share)  # each waits for one worker
        self.deadline, self.idle = deadline, []

    def __call__(self, responses: list[str], references: list[str]) -> list[tuple[float, bool]]:
        """(score, failed) of each response: 1.0 if its last box is equivalent to the reference.

        failed: it overran the deadline or its worker died; it scores 0.0. Raises RunError if no
        worker can be started.
        """
        pairs = [(extract_boxed(text), answer)
                 for text, answer in zip(responses, references, strict=True)]
        # Equal texts are equal answers, and equal pairs need to be judged once.
        grades = {(boxed, answer): (float(boxed == answer), False) for boxed, answer in pairs}
        unequal = [(boxed, answer) for boxed, answer in grades if boxed and boxed != answer]
        grades |= zip(unequal, self.threads.map(self._grade, unequal))
        return [grades[pair] for pair in pairs]

    def _grade(self, pair: tuple[str, str]) -> tuple[float, bool]:
        worker = self._idle_worker()
        try:
            print(json.dumps(pair), file=worker.stdin, flush=True)
        except BrokenPipeError:  # killed while it was idle
            return self._grade(pair)
        if not connection.wait([worker.stdout], timeout=2 * self.deadline):
            worker.kill()  # the kernel should have ended it: it was stopped
        if not (reply := worker.stdout.readline()):
            return 0.0, True  # it has died
        self.idle.append(worker)
        return tuple(json.loads(reply))

    def _idle_worker(self) -> Popen:
        with suppress(IndexError):
            return self.idle.pop()
        command = [sys.executable, os.path.abspath(answers.__file__), str(self.deadline)]
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

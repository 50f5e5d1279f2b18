"""The tasks of an evaluation.

A result is added in constant time: 50,000 images are tens of thousands of blocks.
"""

from genray.evaluation.job import NATURAL, STAGE, BlockResult, Request, Task
from genray.evaluation.suite import CASCADE


class TaskQueue:
    """The tasks of an evaluation, the quick ones first, so that mistakes show early.

    Finished members of the cascade add more.

    Args:
        request, num_examples: the evaluation.
        stored: [Task] -> {task: result} of the tasks with stored results.

    Attributes:
        results: task -> `BlockResult`; `finish` adds to it.
    """

    def __init__(self, request: Request, num_examples: int, stored=lambda tasks: {}):
        self.request, self.num_examples, self.stored = request, num_examples, stored
        self.results: dict[Task, BlockResult] = {}
        self.cascades: dict[str, _Cascade] = {}
        self.columns = [_Column(self, NATURAL, "none")]
        for threat in request.threats:
            for attack in request.columns(threat.norm):
                self.columns.append((_Cascade if attack == "aa" else _Column)(self, attack, threat.norm))
                if attack == "aa":
                    self.cascades[threat.norm] = self.columns[-1]  # type: ignore[assignment]

    def known(self) -> list[Task]:
        """All known tasks, in an order that does not depend on the order of results."""
        return [task for column in self.columns for task in column.tasks]

    def take(self) -> list[Task]:
        """Tasks that can begin now and were not taken before."""
        while True:
            new = [task for column in self.columns for task in column.take()]
            before = self.stored(new) if new else {}
            for task, result in before.items():
                self.finish(task, result)
            if len(before) < len(new) or not new:
                return [task for task in new if task not in before]

    def finish(self, task: Task, result: BlockResult):
        """Adds the result of a task."""
        self.results[task] = result
        if task.attack.startswith(STAGE):
            self.cascades[task.norm].go_on()

    def size(self, task: Task) -> int:
        """Number of examples of a task."""
        if task.examples is not None:
            return len(task.examples)
        return min(self.request.block_size, self.num_examples - task.block * self.request.block_size)


class _Column:
    """The tasks of one attack in one norm: its blocks."""

    def __init__(self, queue, attack, norm):
        self.queue, self.attack, self.norm, self.tasks, self.taken = queue, attack, norm, [], 0
        self._begin()

    def _begin(self):
        blocks = range(-(-self.queue.num_examples // self.queue.request.block_size))
        self.tasks += [Task(self.attack, self.norm, block) for block in blocks]

    def take(self):
        new = self.tasks[self.taken :]
        self.taken = len(self.tasks)
        return new


class _Cascade(_Column):
    """The tasks of AutoAttack's members up to the first unfinished one."""

    def _begin(self):
        self.members, self.finished = iter(CASCADE), 0
        self._attack(range(self.queue.num_examples))

    def _attack(self, alive):
        """Adds the next member's tasks: the remaining examples, packed into full blocks in order."""
        member, size = next(self.members, None), self.queue.request.block_size
        packed = [tuple(alive[start : start + size]) for start in range(0, len(alive), size)] if member else []
        self.stage = [Task(f"{STAGE}{member}", self.norm, block, examples) for block, examples in enumerate(packed)]
        self.tasks += self.stage

    def go_on(self):
        """Begins the next member once all blocks of the one before are finished."""
        results = self.queue.results
        while self.stage:
            while self.finished < len(self.tasks) and self.tasks[self.finished] in results:
                self.finished += 1
            if self.finished < len(self.tasks):
                return
            standing = [zip(task.examples, results[task].flags[task.attack]) for task in self.stage]
            self._attack([example for pairs in standing for example, stands in pairs if stands])

"""The tasks of an evaluation.

A result is added in constant time: 50,000 images are tens of thousands of blocks.
"""

from genray.evaluation.job import NATURAL, STAGE, BlockResult, Request, Task


class TaskQueue:
    """The tasks of an evaluation, the quick ones first, so that mistakes show early.

    Finished stages of a column add more.

    Args:
        request, num_examples: the evaluation.
        stored: [Task] -> {task: result} of the tasks with stored results.

    Attributes:
        results: task -> `BlockResult`; `finish` adds to it.
    """

    def __init__(self, request: Request, num_examples: int, stored=lambda tasks: {}):
        self.request, self.num_examples, self.stored = request, num_examples, stored
        self.results: dict[Task, BlockResult] = {}
        self.columns = [_Column(self, chain) for chain in ([("none", NATURAL)], *request.chains())]
        self.column_of = {stage: column for column in self.columns for stage in column.chain}

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
        self.column_of[task.ball, task.attack].go_on()

    def examples(self, task: Task):
        """Positions of a task's examples in the data set."""
        start = task.block * self.request.block_size
        return task.examples or range(self.num_examples)[start : start + self.request.block_size]

    def size(self, task: Task) -> int:
        """Number of examples of a task."""
        return len(self.examples(task))


class _Column:
    """The tasks of one column in one norm, up to the first unfinished stage of its chain (see `Request.chains`)."""

    def __init__(self, queue, chain):
        self.queue, self.chain, self.tasks = queue, chain, []
        self.begun = self.taken = self.finished = 0
        self._attack(range(queue.num_examples))

    def _attack(self, alive):
        """Adds the next stage's tasks: the remaining examples, packed into full blocks in order."""
        size = self.queue.request.block_size
        self.stage = []
        if self.begun < len(self.chain):
            ball, attack = self.chain[self.begun]
            whole = self.begun == 0 and not attack.startswith(STAGE)  # the blocks' ranges
            packed = [tuple(alive[start : start + size]) for start in range(0, len(alive), size)]
            self.stage = [Task(attack, ball, i, None if whole else part) for i, part in enumerate(packed)]
        self.begun += 1
        self.tasks += self.stage

    def take(self):
        new = self.tasks[self.taken :]
        self.taken = len(self.tasks)
        return new

    def go_on(self):
        """Begins the next stage once all blocks of the one before are finished."""
        results = self.queue.results
        while self.stage:
            while self.finished < len(self.tasks) and self.tasks[self.finished] in results:
                self.finished += 1
            if self.finished < len(self.tasks):
                return
            standing = [zip(self.queue.examples(task), results[task].flags[task.attack]) for task in self.stage]
            self._attack([example for pairs in standing for example, stands in pairs if stands])

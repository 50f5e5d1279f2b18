"""Which tasks an evaluation has, which of them are left, and how much work that is.

Everything is kept up to date as results come, one step a result: 50,000 images are tens of thousands of blocks.
"""

from collections import Counter

from genray.evaluation.engines import PASSES
from genray.evaluation.job import NATURAL, STAGE, BlockResult, Request, Task
from genray.evaluation.suite import CASCADE

FORWARDS_A_PASS = 3  # a backward pass costs about two forward passes


class Todo:
    """The tasks of an evaluation, the quick ones first, so that a mistake shows before hours are spent.

    There are more of them as members of the cascade finish.

    Args:
        request, num_examples: the evaluation.
        stored: [Task] -> {task: result} of those that were finished before.

    Attributes:
        results: task -> `BlockResult`; `finish` adds to it.
        examples: (attack, norm) -> how many the known tasks have.
        done: the same of the finished ones.
    """

    def __init__(self, request: Request, num_examples: int, stored=lambda tasks: {}):
        self.request, self.num_examples, self.stored = request, num_examples, stored
        self.results, self.examples, self.done = {}, Counter(), Counter()
        self.cascades = {}
        self.columns = [_Column(self, NATURAL, "none")]
        for threat in request.threats:
            for attack in request.columns(threat.norm):
                self.columns.append((_Cascade if attack == "aa" else _Column)(self, attack, threat.norm))
                if attack == "aa":
                    self.cascades[threat.norm] = self.columns[-1]

    def known(self) -> list[Task]:
        """In an order that does not depend on when what was finished."""
        return [task for column in self.columns for task in column.tasks]

    def take(self) -> list[Task]:
        """What can be begun now and was not taken before."""
        while True:
            new = [task for column in self.columns for task in column.take()]
            before = self.stored(new) if new else {}
            for task, result in before.items():
                self.finish(task, result)
            if len(before) < len(new) or not new:
                return [task for task in new if task not in before]

    def finish(self, task: Task, result: BlockResult):
        """Keeps the result of a task."""
        self.results[task] = result
        self.done[task.attack, task.norm] += self.size(task)
        if task.attack.startswith(STAGE):
            self.cascades[task.norm].go_on()

    def size(self, task: Task) -> int:
        """How many examples a task has."""
        if task.examples is not None:
            return len(task.examples)
        return min(self.request.block_size, self.num_examples - task.block * self.request.block_size)


class _Column:
    """The tasks of one attack in one norm: its blocks."""

    def __init__(self, todo, attack, norm):
        self.todo, self.attack, self.norm, self.tasks, self.taken = todo, attack, norm, [], 0
        self._begin()

    def _begin(self):
        blocks = range(-(-self.todo.num_examples // self.todo.request.block_size))
        self._add([Task(self.attack, self.norm, block) for block in blocks])

    def _add(self, tasks):
        self.tasks += tasks
        for task in tasks:
            self.todo.examples[task.attack, task.norm] += self.todo.size(task)

    def take(self):
        new = self.tasks[self.taken :]
        self.taken = len(self.tasks)
        return new


class _Cascade(_Column):
    """Those of AutoAttack's members up to the first that is not finished."""

    def _begin(self):
        self.members, self.finished = iter(CASCADE), 0
        self._attack(range(self.todo.num_examples))

    def _attack(self, alive):
        """What is left after a member is packed into full blocks again, in order, for the next one."""
        member, size = next(self.members, None), self.todo.request.block_size
        packed = [tuple(alive[start : start + size]) for start in range(0, len(alive), size)] if member else []
        self.stage = [Task(f"{STAGE}{member}", self.norm, block, examples) for block, examples in enumerate(packed)]
        self._add(self.stage)

    def go_on(self):
        """Begins the next member once all blocks of the one before are finished."""
        results = self.todo.results
        while self.stage:
            while self.finished < len(self.tasks) and self.tasks[self.finished] in results:
                self.finished += 1
            if self.finished < len(self.tasks):
                return
            standing = [zip(task.examples, results[task].flags[task.attack]) for task in self.stage]
            self._attack([example for pairs in standing for example, stands in pairs if stands])


def cost(attack: str, norm: str, stated: dict) -> float:
    """What an example costs that resists, in forward passes; for telling the time left.

    Args:
        attack, norm: of a task.
        stated: the `protocol`, whose attacks say their passes.
    """
    if attack.startswith(STAGE):
        passes, queries = PASSES[stated["engine"]](attack.removeprefix(STAGE), norm, stated["num_classes"])
    else:
        attacks = {(t["norm"], a["name"]): a for t in stated["threats"] for a in t["attacks"]}
        described = attacks.get((norm, attack), {"passes": 0, "queries": 0})
        passes, queries = described["passes"], described["queries"]
    return 1 + FORWARDS_A_PASS * passes + queries


def expected_cost(todo: Todo, stated: dict) -> tuple[float, float]:
    """(of what is finished, of all) in forward passes; members of the cascade that are not known yet are taken to
    have the survivors of the last one that is."""
    price = {kind: cost(*kind, stated) for kind in todo.examples}
    done = sum(number * price[kind] for kind, number in todo.done.items())
    total = sum(number * price[kind] for kind, number in todo.examples.items())
    members = [f"{STAGE}{member}" for member in CASCADE]
    for norm in {norm for attack, norm in todo.examples if attack in members}:
        last = max(members.index(attack) for attack, of in todo.examples if of == norm and attack in members)
        left = todo.examples[members[last], norm]
        if todo.done[members[last], norm] < left:  # else nothing was left for later members
            total += left * sum(cost(member, norm, stated) for member in members[last + 1 :])
    return done, total

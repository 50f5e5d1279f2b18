"""What makes a run that is under way suspect: one line in the log and in its record, and the run goes on."""

import math
from collections.abc import Iterator

CLOSE = 0.01  # relative difference of a loss to that of guessing
STANDARD_ERRORS = 2  # above 1/K, up to which an accuracy is that of guessing
PART_OF_RUN = 1 / 5  # at the accuracy of guessing,
EVALUATIONS = 3  # and at least so many evaluations


class TrainingChecks:
    """Checks the records of a run's epochs.

    Args:
        epochs: of the run.
        num_classes: K.
        examples: images of an evaluation.
        is_robust: whether a base learner is trained under attack: else robust accuracy is not expected.
        redistributes: whether theta_g is handed back; before that, it is a mixture of unrelated weights, and its
            accuracy says nothing.
    """

    def __init__(self, epochs: int, num_classes: int, examples: int, is_robust: bool, redistributes: bool):
        self.epochs, self.is_robust, self.redistributes = epochs, is_robust, redistributes
        self.guessing, self.num_classes = math.log(num_classes), num_classes
        chance = 1 / num_classes
        self.chance = chance + STANDARD_ERRORS * math.sqrt(chance * (1 - chance) / max(examples, 1))

    def warnings(self, records: list[dict]) -> list[str]:
        """Warnings about the newest of the records, from the first on; what the one before had is not said again."""
        found = [*self._guessing(records)]
        if self.is_robust and records[-1]["global"]:
            found += [*self._halved(records), *self._at_chance(records)]
        return found

    def _guessing(self, records) -> Iterator[str]:
        if self._all_guess(records[-1]) and not (records[1:] and self._all_guess(records[-2])):
            names = " and ".join(records[-1]["learners"])
            loss = f"ln {self.num_classes} = {self.guessing:.3f}"
            yield f"epoch {records[-1]['epoch']}: the loss of {names} is that of guessing, {loss}"

    def _all_guess(self, record):
        losses = [learner["loss"] for learner in record["learners"].values()]
        return bool(losses) and all(abs(loss - self.guessing) <= CLOSE * self.guessing for loss in losses)

    def _judged(self, records) -> list[dict]:
        """The evaluated ones whose theta_g is meant to be a classifier."""
        return [r for r in records if r["global"] and (r["redistributions"] or not self.redistributes)]

    def _halved(self, records) -> Iterator[str]:
        judged = self._judged(records)
        for attack, now in _robust(judged[-1]) if len(judged) > 1 else ():
            before = judged[-2]["global"].get(attack, 0)
            if before > self.chance and now <= before / 2:
                yield (
                    f"epoch {records[-1]['epoch']}: the accuracy of theta_g under {attack} fell to {100 * now:.1f} % "
                    f"from {100 * before:.1f} % (epoch {judged[-2]['epoch']})"
                )

    def _at_chance(self, records) -> Iterator[str]:
        judged = self._judged(records)
        for attack, now in _robust(judged[-1]) if judged else ():
            if self._lasts(judged, attack) and not self._lasts(judged[:-1], attack):
                since = judged[-self._streak(judged, attack)]["epoch"]
                yield (
                    f"epoch {records[-1]['epoch']}: the accuracy of theta_g under {attack} has been that of guessing "
                    f"since epoch {since}, {100 * now:.1f} % of {self.num_classes} classes"
                )

    def _lasts(self, judged, attack):
        streak = self._streak(judged, attack)
        if streak < EVALUATIONS:
            return False
        return judged[-1]["epoch"] - judged[-streak]["epoch"] + 1 >= PART_OF_RUN * self.epochs

    def _streak(self, judged, attack) -> int:
        """How many of the last evaluations are at chance."""
        above = [i for i, record in enumerate(judged) if record["global"].get(attack, 0) > self.chance]
        return len(judged) - 1 - (above[-1] if above else -1)


def _robust(record):
    return [(attack, rate) for attack, rate in record["global"].items() if attack != "natural"]

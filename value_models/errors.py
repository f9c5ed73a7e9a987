"""What `value_models` says of a user's mistake: one line that names the file or field, and what is allowed.

    ValueModelError
    |-- HeadShapeError        tensors that do not make a head of the type they claim
    |-- HeadFileError         a head's folder, local or in a store, is incomplete or wrong
    |-- ImportFileError       a file to import is neither a value function of the paper's kind nor a vector
    |-- TextsFileError        a file of pairs or texts to learn from; says which line
    |-- RolloutError          a prompt file, or a run's folder, that cannot be used
    |-- TargetShapeError      rewards, values and masks whose shapes do not belong together
    |-- InstructionError      an instruction that cannot be distilled, or a model without a place for one
    |-- TrainingDataError     rollouts or rewards from which no head can be learnt
    |-- RewardError           an unknown reward, or one that does not return a finite number for each response
    |   `-- PrefixRewardError     a reward or a run without rewards of the text so far; training can do without
    |-- CalibrationError      a head whose value cannot be calibrated to rewards
    |-- MetricError           an unknown metric, or one that has nothing to measure
    `-- MissingPackageError   an optional package is not installed; names the command that installs it

The command line prints these and ends with status 2; anything else that is raised here is a mistake of this program's
and keeps its traceback. `server/errors.py` is the server's own tree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


def first_problem(error: ValidationError, whole: str = "") -> str:
    """`FIELD: REASON` of the first thing that is wrong; `whole` stands for the field where that is all of it."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or whole}: {first['msg']}"


class ValueModelError(ValueError):
    """Root of the tree. The message is for the user."""


class HeadShapeError(ValueModelError):
    pass


class HeadFileError(ValueModelError):
    pass


class ImportFileError(ValueModelError):
    pass


class TextsFileError(ValueModelError):
    pass


class RolloutError(ValueModelError):
    pass


class TargetShapeError(ValueModelError):
    pass


class InstructionError(ValueModelError):
    pass


class TrainingDataError(ValueModelError):
    pass


class RewardError(ValueModelError):
    pass


class PrefixRewardError(RewardError):
    pass


class CalibrationError(ValueModelError):
    pass


class MetricError(ValueModelError):
    pass


class MissingPackageError(ValueModelError):
    def __init__(self, name: str, to_install: str) -> None:
        super().__init__(f"needs {name}; run `pip install {to_install}`")

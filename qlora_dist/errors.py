"""Every error that the project raises on purpose.

::

    QLoRAError                  exit 1   something failed; the message is for a person
    ├── UserError               exit 2   the user's to mend; never retried
    │   ├── SpecError                    the YAML file or an override is wrong
    │   ├── PlanError                    the spec asks for something impossible
    │   ├── DataError                    a dataset is missing, empty or malformed
    │   ├── ModelError                   a model or tokenizer is missing, gated or of another shape
    │   └── RunDirError                  a run directory is missing, in use, or holds another run
    ├── CheckpointError         exit 1   a checkpoint cannot be written, or is not what it says
    ├── BadNodeError            exit 88  this machine cannot do its part; another may
    └── DivergedError           exit 93  the loss is not a number; a restart would only repeat it

Programming errors are assertions and are not caught.
"""

from collections.abc import Sequence


class QLoRAError(Exception):
    """Base of the tree; ``str(error)`` is one message that says what would work."""

    exit_code = 1


class UserError(QLoRAError):
    """Something that only the user can change."""

    exit_code = 2


class SpecError(UserError):
    """One or more keys of a spec are wrong.

    Args:
        problems: One line a problem, each beginning with the dotted path of its key.
        source: The file the spec came from, for the first line of the message.
    """

    def __init__(self, problems: Sequence[str], *, source: str = "the spec") -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"{source}: {count}\n" + "\n".join(f"  {line}" for line in self.problems))


class PlanError(UserError):
    """The spec is well-formed, and what it asks for cannot be."""


class DataError(UserError):
    """A dataset is missing, empty, or has rows that its format cannot read."""


class ModelError(UserError):
    """A model or tokenizer is missing, not accessible, or not the one that the plan counted."""


class RunDirError(UserError):
    """A run directory is missing, in use by another launcher, or belongs to another spec."""


class CheckpointError(QLoRAError):
    """A checkpoint could not be written, or its files are not the ones its manifest names."""


class BadNodeError(QLoRAError):
    """A machine lacks what the run needs of it: a GPU, its memory, a file system."""

    exit_code = 88


class DivergedError(QLoRAError):
    """The loss or the gradient norm is not finite."""

    exit_code = 93

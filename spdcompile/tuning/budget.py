"""What a plan may cost, and what it has to save."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from spdcompile.errors import UsageError


@dataclass(frozen=True, slots=True)
class Budget:
    """What a plan may cost, and what it has to save; all of it has to hold.

    Args:
        max_loss: the perplexity on held-out text rises by at most this share; 0.01 is 1 %.
        min_saved: at least this share of the program's all-reduces is gone. All of them count,
            those of the embeddings and those that cannot be dropped too.
        min_faster: at least this share of the latency of a step is gone.

    Raises:
        UsageError: nothing is asked for, or a share that there cannot be.
    """

    max_loss: float | None = None
    min_saved: float | None = None
    min_faster: float | None = None

    def __post_init__(self) -> None:
        given = {name: share for name, share in asdict(self).items() if share is not None}
        if not given:
            raise UsageError(
                "The budget is empty.",
                where="budget",
                needed="max_loss, min_saved or min_faster",
                fix="for example Budget(max_loss=0.01)",
            )
        for name, share in given.items():
            most = 1 if name != "max_loss" else float("inf")
            if not 0 <= share <= most:
                raise UsageError(
                    "The budget cannot be kept.",
                    where=f"budget.{name}",
                    found=repr(share),
                    needed="a share: 0.01 is 1 %" + ("" if name == "max_loss" else ", 1 at most"),
                )

    @property
    def saves(self) -> bool:
        """Whether something has to be saved, which says how many points go."""
        return self.min_saved is not None or self.min_faster is not None

    def allows(self, increase: float) -> bool:
        """Whether a rise of the perplexity is within the budget.

        Args:
            increase: as a share of the undropped program's perplexity.
        """
        return self.max_loss is None or increase <= self.max_loss

    def __str__(self) -> str:
        words = {
            "at most {:.4g} % perplexity": self.max_loss,
            "at least {:.4g} % of the all-reduces gone": self.min_saved,
            "at least {:.4g} % lower latency": self.min_faster,
        }
        return ", ".join(text.format(100 * x) for text, x in words.items() if x is not None)

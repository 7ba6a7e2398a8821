"""A paper's table as a grid: rows are methods, columns are settings, cells hold what was published and by whom.

A cell without a published number is *unknown* and is never filled in.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from equiframe.errors import unknown
from equiframe.recipe import Recipe

SOURCES = ("paper", "second-hand", "independent rerun")


@dataclass(frozen=True)
class Published:
    """One published top-1 accuracy.

    Attributes:
        value: percent.
        source: ``paper`` (the method's authors, in the paper or its repository), ``second-hand`` (quoted by somebody
            else) or ``independent rerun`` (trained anew by somebody else).
        where: what was read.
        sd, n: standard deviation over n seeds, where they are told.
    """

    value: float
    source: str
    where: str
    sd: float | None = None
    n: int | None = None
    note: str = ""

    def text(self) -> str:
        """``44.66 ± 0.24, n = 3 (independent rerun)``."""
        spread = f" ± {self.sd:g}" if self.sd is not None else ""
        seeds = f", n = {self.n}" if self.n is not None else ""
        return f"{self.value:g}{spread}{seeds} ({self.source}{'; ' + self.note if self.note else ''})"


@dataclass(frozen=True)
class DataSet:
    """What a column needs: for a rough cost its size, for a person where it comes from."""

    label: str
    num_classes: int
    num_train: int  # before any cut to a long tail
    how: str


@dataclass(frozen=True)
class Column:
    """One setting: a data set, how it is cut, and the recipe fields that only this column has.

    Attributes:
        departures: in what the column is known not to be the paper's setting.
    """

    name: str
    what: str
    data: str
    fields: Mapping[str, object] = field(default_factory=dict)
    departures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One method with its fields.

    Attributes:
        published_as: the paper's row that it stands for; None for a row that the paper does not have.
    """

    name: str
    method: str
    what: str
    published_as: str | None = None
    fields: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """Row ``better`` beats row ``worse`` in each column of the table."""

    text: str
    better: str
    worse: str


@dataclass(frozen=True)
class Table:
    """A published table, its claims, and the recipe that its columns share.

    Attributes:
        published: (the paper's row, column) → all published values known to us.
        departures: in what the whole table is known not to be the paper's setting.
        notes: what a reader of the results must know.
    """

    name: str
    paper: str
    what: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]
    fields: Mapping[str, object]
    published: Mapping[tuple[str, str], tuple[Published, ...]] = field(default_factory=dict)
    departures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def paper_rows(self) -> list[str]:
        """The rows as the paper names them."""
        return list(dict.fromkeys(r.published_as for r in self.rows if r.published_as is not None))

    @property
    def num_known(self) -> int:
        """Cells of the paper with a published value known to us."""
        return len(self.published)

    @property
    def num_unknown(self) -> int:
        return len(self.paper_rows) * len(self.columns) - self.num_known

    def cell(self, row: Row, column: Column) -> tuple[Published, ...]:
        """Published values beside this cell; empty where unknown, or where the paper has no such row."""
        return self.published.get((row.published_as, column.name), ())

    def recipe(self, column: Column, row: Row, changes: Mapping[str, object] | None = None) -> Recipe:
        """The recipe of a cell (seed left at its default). ``changes`` override the table and the column, not the
        fields that make the row what it is."""
        stated = {"data": column.data, **self.fields, **column.fields, **(changes or {}), **row.fields}
        return Recipe().with_(**stated, method=row.method)

    def image_passes(
        self, columns: Sequence[Column], rows: Sequence[Row], num_seeds: int, sizes: Mapping[str, DataSet], **changes
    ) -> int:
        """Training images × epochs × rows × seeds, with the paper's data: a rough measure of cost."""
        total = 0
        for column in columns:
            images = num_train(sizes[column.data], column.fields.get("imbalance"))
            total += sum(images * self.recipe(column, row, changes).epochs for row in rows) * num_seeds
        return total


def num_train(data: DataSet, ratio: object = None) -> int:
    """Training images after the cut to an exponential tail (classes that lack images are not accounted for)."""
    if ratio is None:
        return data.num_train
    from equiframe.imbalance import class_profile

    return sum(class_profile(data.num_classes, data.num_train / data.num_classes, float(ratio)))


def choose(kind: str, words: Iterable[str] | None, known: Sequence) -> list:
    """The parts of a table with the given names, or that match a shell pattern (``cifar10-*``), in the table's order;
    all of them for None.

    Raises:
        InputError: for a name that nothing matches, with the nearest one.
    """
    if words is None:
        return list(known)
    names = [part.name for part in known]
    chosen: set[str] = set()
    for word in words:
        found = fnmatch.filter(names, word)
        if not found:
            raise unknown(kind, word, names)
        chosen.update(found)
    return [part for part in known if part.name in chosen]

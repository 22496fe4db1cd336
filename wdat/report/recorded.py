"""From a record's path to what is shown of it: the one way that figures and tables share."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from wdat import records
from wdat.report.rows import norm_name


def of_record(
    kind: str,
    suffix: str,
    save: Callable[[Any, Path], Any],
    context: Callable[[], AbstractContextManager] = nullcontext,
) -> Callable:
    """Makes a function of a record's results one of the record's path, whose outcome is saved beside it and returned.

    The record NAME.json has to be of this kind; what is shown of it is called NAME, or NAME-SUFFIX, where "{r}" in the
    suffix is the function's pixel norm (its first argument after the record). Function and `save` run in the context.
    """

    def wrap(make: Callable) -> Callable:
        @functools.wraps(make)
        def from_path(path: str | Path, *arguments, **settings) -> Any:
            path = Path(path)
            found = records.read(path, kind)["results"]
            r = next(iter([*arguments, *settings.values()]), "inf") if "{r}" in suffix else 0
            with context():
                made = make(found, *arguments, **settings)
                return save(made, path.with_name("-".join(filter(None, (path.stem, suffix.format(r=norm_name(r)))))))

        return from_path

    return wrap

"""How a process of the command line ends: what is printed of an error, and the exit code it means: 2 the user's
mistake, 1 a failure.

Whatever is printed here is `scrubbed`, once and for all: an error may quote any word of the command line, and a word
may be a URL with a password. Where it was taken apart on the way (`data=https://me:hush@h/x` is a choice of a group
to Hydra), the secrets of the words themselves are looked for.
"""

from __future__ import annotations

import atexit
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NoReturn

from vlm_train.errors import VlmError, reader_killed
from vlm_train.locations import SCHEMES, scrubbed

_COLLAPSED = re.compile(rf"\b({'|'.join(SCHEMES)}):/(?!/)", re.IGNORECASE)
_HIDDEN = "***"
_SHORTEST = 6  # what is shorter cannot be told from other text when it stands alone


_READER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (is killed by signal|exited unexpectedly)")
_RANK = re.compile(r"gloo.*Connection (closed|reset) by peer", re.DOTALL)


def tell(error: Exception, words: Sequence[str] = (), *, who: str = "") -> int:
    """Prints an error to stderr and returns the exit code. One that nobody foresaw keeps its traceback."""
    if isinstance(error, OSError):
        where = error.filename if error.filename is not None else error
        error = VlmError(f"the system refused: {error.strerror or type(error).__name__}", got=where,
                         remedy="mend that, then run the same command again")  # fmt: skip
    if isinstance(error, RuntimeError):
        error = _of_another(str(error)) or error
    if isinstance(error, VlmError):
        text, code = f"error: {who}{error}", error.exit_code
    else:
        text, code = "".join(traceback.format_exception(error)).rstrip(), 1
    print(concealed(text, words), file=sys.stderr, flush=True)
    return code


def _of_another(text: str) -> VlmError | None:
    """What torch means where another process is the cause; the line of ours at which it noticed says nothing."""
    if found := _READER.search(text):
        return reader_killed(found[1])
    if _RANK.search(text):
        return VlmError("another rank is gone, in an exchange with it",
                        remedy="what that rank said, or is said of it, is why; the same command resumes")  # fmt: skip
    return None


def leave(code: int) -> NoReturn:
    """Ends the process: threads are waited for, what libraries registered for the end runs, what was printed is out.

    The interpreter is not taken apart. With torch in it that takes longer than many a command, and where a thread of a
    library still runs, the destructors of C++ abort a process whose work is done and written ("terminate called without
    an active exception").
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        print(end="", flush=True)
    except BrokenPipeError:  # the reader of our output (head, less) is gone
        code = code or 1
    except OSError as error:
        code = code or tell(error)
    with suppress(OSError):
        print(end="", file=sys.stderr, flush=True)
    os._exit(code)


def concealed(text: str, words: Sequence[str] = ()) -> str:
    """A text in which every URL is `shown`, and which holds no secret of a URL in `words`, whole or in pieces."""
    text = scrubbed(_COLLAPSED.sub(r"\1://", text))  # a path keeps one slash of two
    secrets = {secret for word in words for secret in _secrets(word)}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, _HIDDEN)
    return text


def _secrets(word: str) -> Iterator[str]:
    """User and password, queries and the values in them, of every URL in a word of the command line."""
    for url in re.split(r"(?=[A-Za-z][A-Za-z0-9+.-]*://)", word)[1:]:
        place, _, query = re.split(r"[\s'\"\]}]", url.partition("://")[2])[0].partition("?")
        account = place.rpartition("@")[0]  # or the way to an @ in the path: told by a host and a port before it
        password = "" if re.match(r"\[|[^/:]*(:\d+)?(/|$)", account) else account.partition(":")[2]
        yield from (part for part in (account if password else "", query) if part)
        values = (pair.partition("=")[2] for pair in re.split("[&;]", query))
        yield from (piece for piece in (password, *values) if len(piece) >= _SHORTEST)

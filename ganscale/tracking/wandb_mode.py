"""How W&B may start here: online, offline or not at all, without a prompt and without a wait."""

import contextlib
import logging
import netrc
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from ganscale.errors import UserError

_PROBE_SECONDS = 3.0

WandbMode = Literal["online", "offline", "disabled"]
Mode = Literal["auto"] | WandbMode

logger = logging.getLogger(__name__)


def chosen_mode(mode: Mode) -> WandbMode:
    """What the config, WANDB_MODE and the API key together ask for.

    `auto` is what WANDB_MODE says, else online where an API key is configured. Raises UserError for
    `online` without one.
    """
    settings = client_settings()
    if mode == "auto":
        preferred = {"dryrun": "offline", "run": "online"}.get(settings.mode, settings.mode)
        if preferred in ("offline", "disabled"):
            return preferred
    if mode in ("offline", "disabled"):
        return mode
    if not _has_api_key(settings):
        if mode == "online":
            raise UserError(
                "tracking mode 'online' needs an API key of Weights & Biases: set WANDB_API_KEY or "
                "run 'wandb login', or choose the mode 'auto' or 'offline'"
            )
        logger.info("no API key of Weights & Biases: this run is tracked offline")
        return "offline"
    return "online"


def client_settings() -> Any:
    """Environment, settings files and defaults, as the client itself reads them."""
    os.environ.setdefault("WANDB_SILENT", "true")  # what matters is said by us
    import wandb  # takes 0.5 s

    return wandb.setup().settings


def _has_api_key(settings: Any) -> bool:
    if settings.api_key or settings.identity_token_file:
        return True
    candidates = [Path("~/.netrc").expanduser(), Path("~/_netrc").expanduser()]
    if "NETRC" in os.environ:
        candidates = [Path(os.environ["NETRC"]).expanduser()]
    for path in candidates:
        # A file that cannot be read gives the client no key either.
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(path).authenticators(urlsplit(settings.base_url).netloc):
                return True
    return False


def answers(url: str) -> bool:
    """Whether `url` gives any answer but a server error within 3 s, name resolution included.

    Left to itself, the client waits 102 s for a server that is away.
    """
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=_PROBE_SECONDS).close()
            answered.set()
        except urllib.error.HTTPError as error:
            if error.code < 500:
                answered.set()
        except OSError:
            pass

    # In a thread, since the timeout of a request does not cover a name server that is away.
    probe = threading.Thread(target=ask, daemon=True)
    probe.start()
    probe.join(_PROBE_SECONDS)
    return answered.is_set()

"""Whether W&B starts online, offline or not at all, decided without a prompt or a long wait."""

import atexit
import contextlib
import logging
import netrc
import os
import shutil
import tempfile
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from ganscale.errors import UserError

WandbMode = Literal["online", "offline", "disabled"]
RequestedMode = Literal["auto"] | WandbMode

logger = logging.getLogger(__name__)


def resolve_mode(mode: RequestedMode) -> WandbMode:
    """`auto` follows WANDB_MODE, and WANDB_DISABLED as Transformers does; without them, `auto` is
    online if an API key is configured and offline otherwise. Raises UserError for `online` without
    a key."""
    settings = client_settings()
    if mode == "auto":
        preferred = {"dryrun": "offline", "run": "online"}.get(settings.mode, settings.mode)
        if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "on", "true", "yes"):
            preferred = "disabled"
        if preferred in ("offline", "disabled"):
            return preferred
    if mode in ("offline", "disabled"):
        return mode
    if _has_api_key(settings):
        return "online"
    if mode == "online":
        raise UserError(
            "tracking online needs a Weights & Biases API key: set WANDB_API_KEY or run "
            "`wandb login`, or train with log.wandb=auto or log.wandb=offline"
        )
    logger.info("no Weights & Biases API key: this run is tracked offline")
    return "offline"


def client_settings() -> Any:
    """The client's settings from the environment, its files and its defaults. Raises UserError for
    a value that the client rejects."""
    os.environ.setdefault("WANDB_SILENT", "true")  # ganscale logs what matters
    for name, value in [*os.environ.items()]:
        if name.startswith("WANDB_") and not value:
            del os.environ[name]  # templates set it so; the client takes "" for a tag or a mode
    _make_up_for_home()
    import pydantic  # comes with wandb, which takes 0.5 s
    import wandb

    try:
        return wandb.setup().settings
    except pydantic.ValidationError as error:  # whose own text also shows values, such as keys
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(
            f"W&B rejects a setting from the variables WANDB_* or a file wandb/settings: {problems}"
        ) from error


def _make_up_for_home() -> None:
    """The client does not start without a home folder, as a container's user may be, and sends no
    artifacts if it cannot write there."""
    try:
        home = Path.home()
    except RuntimeError:
        os.environ["HOME"] = os.devnull
        home = Path(os.devnull)
    if "WANDB_DATA_DIR" not in os.environ and not os.access(home, os.W_OK | os.X_OK):
        with contextlib.suppress(OSError):
            folder = os.environ["WANDB_DATA_DIR"] = tempfile.mkdtemp(prefix="wandb-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)


def _has_api_key(settings: Any) -> bool:
    if settings.api_key or settings.identity_token_file:
        return True
    host = urlsplit(settings.base_url).netloc
    for path in [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]:
        # The client cannot read a key from an unreadable file either.
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(Path(path).expanduser()).authenticators(host):
                return True
    return False


def is_reachable(url: str) -> bool:
    """Whether `url` answers within 3 s, name resolution included, with anything but a server error.

    The client itself would wait 102 s for a server that does not answer.
    """
    has_answered = threading.Event()

    def request() -> None:
        try:
            urllib.request.urlopen(url, timeout=3.0).close()
            has_answered.set()
        except urllib.error.HTTPError as error:
            if error.code < 500:
                has_answered.set()
        except OSError:
            pass

    # In a thread, since a request's timeout does not cover a name server that does not answer.
    probe = threading.Thread(target=request, daemon=True)
    probe.start()
    probe.join(3.0)
    return has_answered.is_set()

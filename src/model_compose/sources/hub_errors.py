"""What huggingface_hub raises -> one sentence and the remedy.

Never quotes the error itself, which may hold addresses that grant access.
"""

import errno
from dataclasses import dataclass
from pathlib import Path


def hub_errors() -> tuple[type[Exception], ...]:
    """All that a download raises. RuntimeError and its kin come from Xet, the Hub's storage."""
    from huggingface_hub import errors

    http_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]  # of whichever httpx the hub uses
    return (http_error, errors.EntryNotFoundError, OSError, RuntimeError, errors.XetDownloadError)


@dataclass(frozen=True)
class Failure:
    """What was being fetched when it failed. `local_namesake`: there is a local folder of the repository's name."""

    name: str
    repository: str
    revision: str
    cache: Path
    with_token: bool
    local_namesake: bool

    @property
    def sign_in(self) -> str:
        return "set another `token`" if self.with_token else "set `token` or run `hf auth login`"

    def explain(self, error: BaseException) -> str:
        from huggingface_hub import errors

        if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
            error = error.__cause__  # "perhaps there is no network", for want of a better reason
        page = f"https://huggingface.co/{self.repository}"
        match error:
            case errors.GatedRepoError():
                return f"{self.repository} is gated: accept its licence at {page}, then {self.sign_in}."
            case errors.DisabledRepoError():
                return f"{self.repository} was disabled on the Hub: choose another model."
            case errors.RepositoryNotFoundError():
                return self._no_repository()
            case errors.RevisionNotFoundError():
                return (
                    f"{self.repository} has no revision '{self.revision}': set `revision` to a branch, tag or commit "
                    f"of {page}/commits."
                )
            case errors.RemoteEntryNotFoundError():
                return f"A file of {self.name} is gone from the Hub: run again, or set `revision` to another commit."
            case errors.HfHubHTTPError():
                return self._bad_answer(error.response.status_code)
            case errors.OfflineModeIsEnabled():
                return (
                    f"{self.name} is not, or not wholly, in the cache {self.cache}, and HF_HUB_OFFLINE forbids to "
                    "fetch it: unset that once, or point to a local folder."
                )
            case OSError(errno=errno.ENOSPC | errno.EDQUOT):
                return (
                    f"The disk is full while fetching {self.name}: free space in {self.cache}, or set `cache_dir` or "
                    "HF_HOME to a larger disk. What is finished is kept."
                )
            case PermissionError():
                return f"{self.cache} cannot be written: set its rights, or `cache_dir` or HF_HOME to another folder."
        return self._unreachable()

    def _no_repository(self) -> str:
        seen = "or this token may not see it" if self.with_token else "or it is private"
        if self.local_namesake:
            return f"The Hub has no repository {self.repository}, {seen}: for the folder write './{self.repository}'."
        return f"The Hub has no repository {self.repository}, {seen}: check the spelling, or {self.sign_in}."

    def _bad_answer(self, status: int) -> str:
        if status == 401:
            settings = "https://huggingface.co/settings/tokens"
            return f"The Hub refuses the token for {self.name}: make a new one at {settings}, then {self.sign_in}."
        if status == 403:
            return f"The token has no right to read {self.name}: give it that right, or {self.sign_in}."
        if status == 429:
            return f"The Hub limits how often you may ask for {self.name}: wait some minutes, or {self.sign_in}."
        return f"The Hub cannot serve {self.name} now (status {status}): try again later. What is finished is kept."

    def _unreachable(self) -> str:
        from huggingface_hub import constants

        return (
            f"{self.name} is not, or not wholly, in the cache {self.cache}, and the connection to {constants.ENDPOINT} "
            "failed or broke off: connect to the network and run again (what is finished is kept), set HF_ENDPOINT to "
            "a mirror, or point to a local folder."
        )

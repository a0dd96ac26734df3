"""Turns an exception of huggingface_hub into one sentence that says what went wrong and what to do.

The sentence never quotes the exception, which may hold signed addresses that grant access.
"""

import errno
from dataclasses import dataclass
from pathlib import Path


def hub_errors() -> tuple[type[Exception], ...]:
    """All exception classes that a download raises. RuntimeError and XetDownloadError come from Xet, the Hub's
    storage."""
    from huggingface_hub import errors

    http_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]  # the HTTP library's own class
    return (http_error, errors.EntryNotFoundError, OSError, RuntimeError, errors.XetDownloadError)


@dataclass(frozen=True)
class Failure:
    """What was being fetched when the error came. `local_namesake`: a local folder has the same name as the
    repository."""

    name: str
    repository: str
    revision: str
    cache: Path
    with_token: bool
    local_namesake: bool

    @property
    def sign_in(self) -> str:
        """What to do about a missing or wrong token."""
        return "set another `token`" if self.with_token else "set `token` or run `hf auth login`"

    def explain(self, error: BaseException) -> str:
        """The sentence for an error of `hub_errors`."""
        from huggingface_hub import errors

        if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
            error = error.__cause__  # the outer error only guesses that the network is down; its cause is the reason
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
                return f"A file of {self.name} is no longer on the Hub: run again, or set `revision` to another commit."
            case errors.HfHubHTTPError():
                return self._bad_answer(error.response.status_code)
            case errors.OfflineModeIsEnabled():
                return (
                    f"{self.name} is missing or incomplete in the cache {self.cache}, and HF_HUB_OFFLINE forbids "
                    "fetching it: unset that variable for one run, or point to a local folder."
                )
            case OSError(errno=errno.ENOSPC | errno.EDQUOT):
                return (
                    f"{self.name} cannot be fetched, since the disk is full: free space in {self.cache}, or set "
                    "`cache_dir` or HF_HOME to a folder on a larger disk. Finished files are kept."
                )
            case PermissionError():
                return (
                    f"The cache {self.cache} cannot be written: change its permissions, or set `cache_dir` or HF_HOME to "
                    "another folder."
                )
        return self._unreachable()

    def _no_repository(self) -> str:
        seen = "or this token may not see it" if self.with_token else "or it is private"
        if self.local_namesake:
            return (
                f"The Hub has no repository {self.repository}, {seen}: if you mean the local folder, write "
                f"'./{self.repository}'."
            )
        return f"The Hub has no repository {self.repository}, {seen}: check the spelling, or {self.sign_in}."

    def _bad_answer(self, status: int) -> str:
        if status == 401:
            settings = "https://huggingface.co/settings/tokens"
            return f"The Hub rejected the token for {self.name}: create a new one at {settings}, then {self.sign_in}."
        if status == 403:
            return f"The token has no permission to read {self.name}: grant it, or {self.sign_in}."
        if status == 429:
            return f"The Hub received too many requests for {self.name}: wait some minutes, or {self.sign_in}."
        return f"The Hub cannot serve {self.name} now (status {status}): try again later. Finished files are kept."

    def _unreachable(self) -> str:
        from huggingface_hub import constants

        return (
            f"{self.name} is missing or incomplete in the cache {self.cache}, and the connection to "
            f"{constants.ENDPOINT} failed: connect to the network and run again (finished files are kept), set "
            "HF_ENDPOINT to a mirror, or point to a local folder."
        )

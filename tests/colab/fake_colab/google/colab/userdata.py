"""The secret store behind the key icon."""

from google.colab import errors

SECRETS: dict[str, str] = {}
ANSWER: Exception | None = None  # what the store raises instead of answering


class SecretNotFoundError(errors.Error):
    def __init__(self, key: str) -> None:
        super().__init__(f"Secret {key} does not exist.")


class NotebookAccessError(errors.Error):
    def __init__(self, key: str) -> None:
        super().__init__(f"Notebook does not have access to secret {key}")


class TimeoutException(errors.Error):
    def __init__(self, key: str) -> None:
        super().__init__(
            f"Requesting secret {key} timed out. Secrets can only be fetched when running from the Colab UI."
        )


def get(key: str) -> str:
    if ANSWER is not None:
        raise ANSWER
    if key not in SECRETS:
        raise SecretNotFoundError(key)
    return SECRETS[key]

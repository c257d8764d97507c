"""The browser's side: what was handed to it."""

DOWNLOADED: list[str] = []


def download(filename: str) -> None:
    DOWNLOADED.append(filename)

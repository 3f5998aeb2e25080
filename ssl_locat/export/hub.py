"""Upload an export folder to the Hugging Face hub. Where and as whom are huggingface_hub's own settings: HF_ENDPOINT, HF_TOKEN, `hf auth login`."""

import logging
from pathlib import Path

from huggingface_hub import HfApi

from ssl_locat.errors import UserError

log = logging.getLogger(__name__)


def push(folder: Path, name: str) -> str:
    """Upload `folder` to the repository `name`, made if it is not there; returns its full name. Raises UserError if the hub refuses."""
    api = HfApi(library_name="ssl_locat")
    try:
        # the full name: "mine" becomes "user/mine"
        repository = api.create_repo(name, exist_ok=True).repo_id
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload an ssl_locat export")
    except Exception as error:  # its errors, and those of whichever HTTP client this version of it uses
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"{folder} is written, but could not be uploaded to {name!r}: {reason}. Log in with `hf auth login`."
        ) from None
    log.info("Uploaded to %s; load it with timm.create_model('hf-hub:%s', pretrained=True).", repository, repository)
    return repository

"""The page at ``/batch``: what the server does, for a person with a browser, and the forms to give it work.

Knows the storage's records, the routes of files and batches, and what a browser may send; not SGLang.

INVARIANT: a view costs the same however many rows batches have; text of users is escaped; nothing changes that a page
of another origin sent, and where there is a key nothing is shown to who has not signed in with it.
"""

from batchllm.server.page.app import BatchPage
from batchllm.server.page.content import LiveNumbers

__all__ = ["BatchPage", "LiveNumbers"]

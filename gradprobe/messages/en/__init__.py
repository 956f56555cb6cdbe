"""Every message in English, one topic a file."""

from gradprobe.messages.en import report, verdict

MESSAGES: dict[str, str] = {**verdict.MESSAGES, **report.MESSAGES}

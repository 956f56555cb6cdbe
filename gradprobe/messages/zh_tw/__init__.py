"""所有訊息，臺灣正體中文，每個主題一個檔案。"""

from gradprobe.messages.zh_tw import advice, report, summary, verdict

MESSAGES: dict[str, str] = {**verdict.MESSAGES, **advice.MESSAGES, **report.MESSAGES, **summary.MESSAGES}

"""Every sentence once in each language: code makes messages of keys and values, and a language says them."""

from gradprobe.messages.language import ENGLISH, LANGUAGES, Language, Message, Value

__all__ = ["ENGLISH", "LANGUAGES", "Language", "Message", "Value"]

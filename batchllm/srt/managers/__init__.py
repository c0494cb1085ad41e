"""The loops of scheduler, tokenizer and detokenizer, and what travels between them. (Upstream: ``srt/managers``.)"""

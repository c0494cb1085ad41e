"""Grammars. (Upstream: ``srt/constrained``.)"""

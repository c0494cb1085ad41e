"""Adapters. (Upstream: ``srt/lora``.)"""

"""What a step computes: attention, linear layers and operators of a CPU, sampling. (Upstream: ``srt/layers``.)"""

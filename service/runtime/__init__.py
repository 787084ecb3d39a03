"""Execution plans: the ways to run a signature on this machine, and the choice between them.

TensorFlow and OpenVINO are imported here only, inside functions, so that a process that needs
neither never loads them.
"""

"""Healing: a converted model is trained back toward its teacher on accelerate, FSDP2 and torch's distributed checkpoint.

pair: model and teacher on disk, and whether they belong together. unfinished: the directory of a run that is not done.
processes: one or several. text, blocks: what is trained on, packed. student: model and teacher in one. top_probabilities: the
teacher's, kept on disk. losses, distillation: what is minimized. preconditioning: the coordinates it is minimized in. loop,
state: steps and evaluations, and what is saved of them. training: all of these together. record, writing: what comes out.
"""

"""Reports on a model without changing it: what runs in NVFP4 (coverage), and what a GPU would take (project).

The parts of them that sensitivity/ and telemetry/ need too lie here as well: one undisturbed forward pass, and columns.
"""

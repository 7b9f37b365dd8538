"""Other tools' files: checkpoints written as them, and runs begun with what they hold.

export.py            checkpoint → safetensors, torch or DCP
adopt.py             safetensors, torch or DCP → the first checkpoint of a run
note.py              what the files cannot say themselves, so that an export comes back exactly
safetensors_file.py, torch_files.py, dcp_files.py   the formats
"""

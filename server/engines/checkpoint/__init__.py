"""What a model folder, file, package or hub id holds, and whether it can be served; both engines ask here.

A checkpoint is looked at before any weight is read: what this program cannot serve rightly raises ModelLoadError with
one line that names the path, what is wrong with it and what is allowed. Knows nothing of engines. Enter at
`model_files.ModelFiles`.
"""

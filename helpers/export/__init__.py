"""After training: keep it, and use it anywhere.

    export_script(run, "export")                          # the run as one plain Python file without this package
    merged = merge(run)                                   # one 16-bit model: base + adapter
    to_gguf(merged, "model-q4_k_m.gguf", "q4_k_m")        # for llama.cpp and Ollama, with a Modelfile beside it
    push_to_hub(run.adapter, "you/your-adapter")          # private; nothing is uploaded without this call
    download(zip_folder(run.adapter))                     # Colab's download button

Everything is written under another name and renamed at the end, so what carries its final name is whole.
"""

from helpers.export.card import model_card as model_card
from helpers.export.gguf import modelfile as modelfile
from helpers.export.gguf import to_gguf as to_gguf
from helpers.export.hub import download as download
from helpers.export.hub import push_to_hub as push_to_hub
from helpers.export.hub import zip_folder as zip_folder
from helpers.export.merging import merge as merge
from helpers.export.report import write_report as write_report
from helpers.export.script import export_plan as export_plan
from helpers.export.script import export_script as export_script
from helpers.files import ExportError as ExportError

"""How a frozen backbone is evaluated: the commands at this door (evaluate, compare, and online for probes during pretraining),
protocols/ with one file each, shared/ with what they have in common.

Imported by pretraining (probes), tables, report, cluster, cli. Begin with evaluate.py, then protocols/knn.py.
"""

# name -> where its evaluate() lives; looked up as text, so that a misspelt key is answered before torch is imported
PROTOCOLS = {
    "knn": "ssl_locat.evaluation.protocols.knn:evaluate",
    "linear": "ssl_locat.evaluation.protocols.linear:evaluate",
    "linear_sweep": "ssl_locat.evaluation.protocols.linear:sweep",
    "supervised": "ssl_locat.evaluation.protocols.supervised:evaluate",
    "validate": "ssl_locat.evaluation.protocols.validate:evaluate",
    "segmentation": "ssl_locat.evaluation.protocols.segmentation:evaluate",
    "hummingbird": "ssl_locat.evaluation.protocols.hummingbird:evaluate",
    "held_out": "ssl_locat.evaluation.protocols.held_out:evaluate",
    "locality": "ssl_locat.evaluation.protocols.locality:evaluate",
    "attention": "ssl_locat.evaluation.protocols.attention:evaluate",
    "efficiency": "ssl_locat.evaluation.protocols.efficiency:evaluate",
    "metadata": "ssl_locat.evaluation.protocols.metadata:evaluate",
    "unlabelled": "ssl_locat.evaluation.protocols.unlabelled:evaluate",
}

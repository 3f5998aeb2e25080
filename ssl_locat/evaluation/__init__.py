"""How a backbone is judged: one file per protocol, each with `evaluate(backbone, *, ...) -> dict[str, float]` whose keyword arguments are
the protocol's YAML (eval/NAME.yaml). The same functions serve `ssl-locat evaluate`, tables, and the probes during pretraining."""

# name -> where its evaluate() lives; looked up as text, so that a misspelt key is answered before torch is imported
PROTOCOLS = {
    "knn": "ssl_locat.evaluation.knn:evaluate",
    "linear": "ssl_locat.evaluation.linear:evaluate",
    "linear_sweep": "ssl_locat.evaluation.linear:sweep",
    "supervised": "ssl_locat.evaluation.supervised:evaluate",
    "segmentation": "ssl_locat.evaluation.segmentation:evaluate",
    "hummingbird": "ssl_locat.evaluation.hummingbird:evaluate",
    "locality": "ssl_locat.evaluation.locality:evaluate",
    "attention": "ssl_locat.evaluation.attention:evaluate",
    "efficiency": "ssl_locat.evaluation.efficiency:evaluate",
}

"""`CurvatureBoard`: curvature in TensorBoard while a model trains."""

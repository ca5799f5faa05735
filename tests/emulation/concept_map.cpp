#include "concept_map_cuda.cu"

// The active blocks of a matrix, sorted by block row or by block column.

#pragma once

#include <cstdint>

extern "C" {
// As `hf_dynsparse/blocks/layout.py` derives it from a block index.
struct Order {
    const int32_t* offsets;  // [block rows + 1] or [block columns + 1] where each begins
    const int32_t* rows;     // [nnzb] block row
    const int32_t* columns;  // [nnzb] block column
    const int32_t* slots;    // [nnzb] where the entries are stored
};
}

namespace {

// The blocks that make up each line of outputs.
struct Lines {
    const int32_t* offsets;  // [lines + 1] where each line begins
    const int32_t* blocks;   // [nnzb] which block of input features each block reads
    const int32_t* slots;    // [nnzb] where its entries are stored; null: in this order
};

}  // namespace

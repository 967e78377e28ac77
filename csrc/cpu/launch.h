// Utilities of the CPU launchers: typed pointers from stable-ABI tensors, argument checks, and loops over torch's
// threads.
#pragma once

#include <algorithm>
#include <vector>

#include "common.h"
#include "cpu/isa.h"

namespace sgmim {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <class T>
T* data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

// Calls body(float{}) or body(Bf16{}), according to the tensor's dtype; raises for any other.
template <class Body>
void dispatch_float(const Tensor& tensor, const char* name, const Body& body) {
  if (tensor.scalar_type() == ScalarType::Float) {
    body(float{});
  } else if (tensor.scalar_type() == ScalarType::BFloat16) {
    body(Bf16{});
  } else {
    SGMIM_CHECK(false, name, " must be float32 or bfloat16, got ", torch::headeronly::toString(tensor.scalar_type()));
  }
}

// Checks that a tensor is contiguous and has `count` values of a dtype. Kernels use raw pointers, so each launcher
// checks every tensor first. (The dispatcher ensures that all of them are on the CPU.)
inline void check_packed(const Tensor& tensor, const char* name, ScalarType type, int64_t count) {
  SGMIM_CHECK(
      tensor.scalar_type() == type, name, " must be ", torch::headeronly::toString(type), ", got ",
      torch::headeronly::toString(tensor.scalar_type()));
  SGMIM_CHECK(
      tensor.is_contiguous() && tensor.numel() == count, name, " must be contiguous and have ", count, " values, got ",
      tensor.numel());
}

inline void check_packed(const std::optional<Tensor>& tensor, const char* name, ScalarType type, int64_t count) {
  if (tensor.has_value()) check_packed(*tensor, name, type, count);
}

// Checks that a tensor is a contiguous matrix.
inline void check_matrix(const Tensor& tensor, const char* name) {
  SGMIM_CHECK(tensor.dim() == 2 && tensor.is_contiguous(), name,
              " must be contiguous with 2 dimensions, got ", tensor.dim(), " dimensions");
}

// Checks that all indices are in [0, limit): they come from the caller, and index raw memory.
inline void check_rows(const Tensor& rows, int64_t limit, const char* name) {
  check_packed(rows, name, ScalarType::Long, rows.numel());
  const int64_t* row = data<int64_t>(rows);
  const int64_t count = rows.numel();
  for (int64_t i = 0; i < count; ++i)
    SGMIM_CHECK(0 <= row[i] && row[i] < limit, name, " has ", row[i], "; expected indices from 0 to below ", limit);
}

// Returns the inverse of a list of distinct rows: the position of each of `limit` row numbers in the list, or -1.
inline std::vector<int64_t> places(const Tensor& rows, int64_t limit, const char* name) {
  check_rows(rows, limit, name);
  std::vector<int64_t> place(limit, -1);
  const int64_t* row = data<int64_t>(rows);
  const int64_t count = rows.numel();
  for (int64_t i = 0; i < count; ++i) {
    SGMIM_CHECK(place[row[i]] < 0, name, " has ", row[i], " twice; expected distinct indices");
    place[row[i]] = i;
  }
  return place;
}

// Checks offsets of packed rows: they start at 0, never decrease and end at `count`.
inline void check_offsets(const Tensor& offsets, int64_t count, const char* name) {
  check_packed(offsets, name, ScalarType::Long, offsets.numel());
  const int64_t* at = data<int64_t>(offsets);
  const int64_t images = offsets.numel() - 1;
  bool rising = images >= 0 && at[0] == 0 && at[images] == count;
  for (int64_t b = 0; b < images; ++b) rising = rising && at[b] <= at[b + 1];
  SGMIM_CHECK(rising, name, " does not rise; expected offsets from 0 to the number of rows, ", count);
}

// Checks that the rows of each image, of `cells` cells, are in that image and ascending. `offsets` have been checked.
inline void check_image_rows(const Tensor& rows, const Tensor& offsets, int64_t cells, const char* name) {
  const int64_t *row = data<int64_t>(rows), *at = data<int64_t>(offsets);
  const int64_t images = offsets.numel() - 1;
  check_packed(rows, name, ScalarType::Long, at[images]);
  for (int64_t b = 0; b < images; ++b) {
    int64_t before = b * cells - 1;
    for (int64_t i = at[b]; i < at[b + 1]; before = row[i++])
      SGMIM_CHECK(
          before < row[i] && row[i] < (b + 1) * cells, name, " has ", row[i], " in image ", b,
          "; expected ascending indices from ", b * cells, " to below ", (b + 1) * cells);
  }
}

// Calls body(begin, end) over [0, count) on torch's threads, with at least `grain` items each.
template <class Body>
void parallel(int64_t count, int64_t grain, const Body& body) {
  if (count > 0) torch::stable::parallel_for(0, count, std::max<int64_t>(grain, 1), body);
}

// Calls body(begin, end) on torch's threads over units of work, `count` for each block of `width` columns. As the last
// block may be narrow, threads divide the columns, with at least `grain` columns times units each. A unit belongs to
// the thread in whose part it begins.
template <class Body>
void parallel_blocks(int64_t columns, int64_t width, int64_t count, int64_t grain, const Body& body) {
  const auto unit = [&](int64_t at) {
    const int64_t block = std::min(at / (width * count), (columns - 1) / width);
    const int64_t here = std::min(width, columns - block * width);
    return block * count + (at - block * width * count + here - 1) / here;
  };
  parallel(columns * count, grain, [&](int64_t begin, int64_t end) { body(unit(begin), unit(end)); });
}

// Computes column sums over rows, with the same bits for any number of threads: the rows are divided into blocks that
// depend on the shape alone, each block sums into its own buffer, and the buffers are added in order. Sixteen rows at a
// time are summed in float, and these sums in double, so that the sum over 150,000 rows has the error of that over
// sixteen.
//
// body(begin, end, partial) adds rows [begin, end) to `partial`, `width` zeroed floats.
template <class Body>
void column_sums(int64_t rows, int64_t width, float* out, const Body& body) {
  constexpr int64_t FEW = 16;
  const int64_t blocks = std::clamp<int64_t>(rows / 8, 1, 16);
  std::vector<double> totals(blocks * width, 0.0);
  parallel(blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> partial(width);
    for (int64_t b = begin; b < end; ++b) {
      double* total = totals.data() + b * width;
      const int64_t last = (b + 1) * rows / blocks;
      for (int64_t first = b * rows / blocks; first < last; first += FEW) {
        std::fill(partial.begin(), partial.end(), 0.0f);
        body(first, std::min(first + FEW, last), partial.data());
        for (int64_t i = 0; i < width; ++i) total[i] += partial[i];
      }
    }
  });
  for (int64_t i = 0; i < width; ++i) {
    double sum = 0;
    for (int64_t b = 0; b < blocks; ++b) sum += totals[b * width + i];
    out[i] = static_cast<float>(sum);
  }
}

}  // namespace sgmim

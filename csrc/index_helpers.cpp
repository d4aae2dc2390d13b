// The two walks of data/indices.py that numpy does slower: sample starts and greedy blending.
// Every function gives exactly the array of its numpy twin; tests compare them.
// Doubles are plain IEEE arithmetic: built with -ffp-contract=off, for a fused multiply-add
// would round differently and choose another dataset.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

namespace py = pybind11;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

namespace {

constexpr std::int64_t kPrefetch = 24;  // documents are visited in random order: fetch ahead

// rows [num_samples + 1, 2]: position in document_index and token offset of each sample's start
template <typename T>
void walk_samples(const std::int32_t* sizes, std::int64_t num_sizes, const std::int32_t* documents,
                  std::int64_t num_documents, std::int64_t seq_length, std::int64_t num_samples,
                  T* rows) {
  rows[0] = 0;
  rows[1] = 0;
  std::int64_t position = -1;
  std::int64_t begin = 0;  // tokens before the current document
  std::int64_t end = 0;    // and up to its end
  for (std::int64_t sample = 1; sample <= num_samples; ++sample) {
    const std::int64_t start = sample * seq_length;
    while (end <= start) {
      if (++position >= num_documents) throw std::out_of_range("fewer tokens than samples need");
      if (position + kPrefetch < num_documents) {
        const auto ahead = static_cast<std::uint32_t>(documents[position + kPrefetch]);
        if (ahead < static_cast<std::uint64_t>(num_sizes)) __builtin_prefetch(sizes + ahead);
      }
      const auto document = static_cast<std::uint32_t>(documents[position]);
      if (document >= static_cast<std::uint64_t>(num_sizes))
        throw std::out_of_range("a document number is outside the lengths");
      begin = end;
      end += sizes[document];
    }
    rows[2 * sample] = static_cast<T>(position);
    rows[2 * sample + 1] = static_cast<T>(start - begin);
  }
}

template <typename T>
py::array_t<T> sample_index(const Array<std::int32_t>& sizes, const Array<std::int32_t>& documents,
                            std::int64_t seq_length, std::int64_t num_samples) {
  if (seq_length < 1 || num_samples < 0) throw std::invalid_argument("negative size");
  py::array_t<T> rows({num_samples + 1, static_cast<std::int64_t>(2)});
  const auto* size_data = sizes.data();
  const auto* document_data = documents.data();
  T* row_data = rows.mutable_data();
  {
    py::gil_scoped_release release;
    walk_samples<T>(size_data, sizes.size(), document_data, documents.size(), seq_length,
                    num_samples, row_data);
  }
  return rows;
}

// The dataset that is furthest behind its share gets the next sample; the lowest number on a tie.
// limits[i] samples at most from dataset i.
void walk_blend(const std::vector<double>& shares, std::vector<std::int64_t> limits,
                std::int64_t size, std::int16_t* dataset, std::int64_t* sample) {
  constexpr double kNever = std::numeric_limits<double>::infinity();
  const std::size_t count = shares.size();
  std::vector<double> taken(count, 0.0);  // exact below 2^53
  for (std::size_t i = 0; i < count; ++i)
    if (limits[i] <= 0) taken[i] = kNever;
  for (std::int64_t k = 0; k < size; ++k) {
    const double position = std::max(static_cast<double>(k), 1.0);
    std::size_t chosen = count;
    double furthest = std::numeric_limits<double>::lowest();
    for (std::size_t i = 0; i < count; ++i) {
      const double error = shares[i] * position - taken[i];
      if (error > furthest) {
        furthest = error;
        chosen = i;
      }
    }
    if (chosen >= count) throw std::out_of_range("no dataset has samples left");
    dataset[k] = static_cast<std::int16_t>(chosen);
    sample[k] = static_cast<std::int64_t>(taken[chosen]);
    taken[chosen] += 1.0;
    if (--limits[chosen] == 0) taken[chosen] = kNever;
  }
}

py::tuple blend(const std::vector<double>& shares, std::vector<std::int64_t> limits,
                std::int64_t size) {
  if (shares.empty() || shares.size() != limits.size() || shares.size() > 32767 || size < 0)
    throw std::invalid_argument("shares and limits must be as many, 1 to 32767, and size >= 0");
  Array<std::int16_t> dataset(size);
  Array<std::int64_t> sample(size);
  auto* dataset_data = dataset.mutable_data();
  auto* sample_data = sample.mutable_data();
  {
    py::gil_scoped_release release;
    walk_blend(shares, std::move(limits), size, dataset_data, sample_data);
  }
  return py::make_tuple(dataset, sample);
}

}  // namespace

PYBIND11_MODULE(_index_helpers, module) {
  module.doc() = "Sample and blend indices; the twins of megatron_lite.data.indices.";
  module.def("sample_index_int32", &sample_index<std::int32_t>, py::arg("sizes"),
             py::arg("documents"), py::arg("seq_length"), py::arg("num_samples"));
  module.def("sample_index_int64", &sample_index<std::int64_t>, py::arg("sizes"),
             py::arg("documents"), py::arg("seq_length"), py::arg("num_samples"));
  module.def("blend", &blend, py::arg("shares"), py::arg("limits"), py::arg("size"));
}

// The walks of data/indices.py that numpy does slower: sample starts, greedy blending, shuffling.
// Every function gives exactly the array of its numpy twin; tests compare them.
// Doubles are plain IEEE arithmetic: built with -ffp-contract=off, for a fused multiply-add
// would round differently and choose another dataset.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define BLEND_WITH_AVX2 1
#endif

namespace py = pybind11;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

namespace {

// ---------------------------------------------------------------- sample index

constexpr std::int64_t kPrefetch = 64;  // documents are visited in random order: fetch ahead

// A hint only, so that a wrong document number does no harm here.
inline void prefetch(const std::int32_t* sizes, std::int32_t document) {
  const auto offset = sizeof(std::int32_t) * static_cast<std::uint32_t>(document);
  __builtin_prefetch(reinterpret_cast<const char*>(reinterpret_cast<std::uintptr_t>(sizes) + offset));
}

// rows [num_samples + 1, 2]: position in document_index and token offset of each sample's start
template <typename T>
void walk_samples(const std::int32_t* sizes, std::int64_t num_sizes, const std::int32_t* documents,
                  std::int64_t num_documents, std::int64_t seq_length, std::int64_t num_samples,
                  T* rows) {
  rows[0] = 0;
  rows[1] = 0;
  T* row = rows + 2;
  const T* const last = rows + 2 * num_samples;
  std::int64_t start = seq_length;  // first token of the sample whose row comes next
  std::int64_t end = 0;             // tokens up to the end of the current document
  for (std::int64_t position = 0; row <= last; ++position) {
    if (position >= num_documents) throw std::out_of_range("fewer tokens than samples need");
    if (position + kPrefetch < num_documents) prefetch(sizes, documents[position + kPrefetch]);
    const auto document = static_cast<std::uint32_t>(documents[position]);
    if (document >= static_cast<std::uint64_t>(num_sizes))
      throw std::out_of_range("a document number is outside the lengths");
    const std::int64_t begin = end;
    end += sizes[document];
    // The row is written in any case and kept only if the sample starts in this document: whether
    // it does is as good as random, and a mispredicted branch costs more than two stores.
    row[0] = static_cast<T>(position);
    row[1] = static_cast<T>(start - begin);
    const bool starts_here = start < end;
    row += starts_here ? 2 : 0;
    start += starts_here ? seq_length : 0;
    while (start < end && row <= last) {  // long documents hold several starts
      row[0] = static_cast<T>(position);
      row[1] = static_cast<T>(start - begin);
      row += 2;
      start += seq_length;
    }
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

// ---------------------------------------------------------------- blending

// The dataset that is furthest behind its share gets the next sample; the lowest number on a tie.
// One choice needs the one before, so a single walk waits for its own arithmetic.  Therefore the
// sequence is cut into stretches that are walked side by side, each from *guessed* counts, and
// then joined: the walk goes on over the border with the true counts until they meet those of the
// guessed walk.  From a step on at which all counts are equal all choices are equal, so what is
// joined is exactly what one walk gives; a guess that never meets costs time and nothing else.

constexpr double kNever = std::numeric_limits<double>::infinity();
constexpr std::size_t kLanes = 4;

// Doubles in whole vectors, aligned to them.
class Lanes {
 public:
  Lanes(std::size_t size, double value)
      : groups_((size + kLanes - 1) / kLanes, Group{{value, value, value, value}}) {}

  std::size_t groups() const { return groups_.size(); }
  double* data() { return groups_.front().lane; }
  const double* data() const { return groups_.front().lane; }
  double& operator[](std::size_t i) { return data()[i]; }
  double operator[](std::size_t i) const { return data()[i]; }

 private:
  struct alignas(8 * kLanes) Group {
    double lane[kLanes];
  };
  std::vector<Group> groups_;
};

struct Blend {
  Lanes shares;  // those behind the last dataset are 0
  std::vector<std::int64_t> limits;
  std::int64_t size;
  std::int16_t* dataset;
  std::int64_t* sample;
};

// Where a walk stands: the next step and what every dataset has given so far.
class Walk {
 public:
  Walk(const Blend& blend, std::int64_t step, std::int64_t stop, std::vector<std::int64_t> counts)
      : step(step), stop(stop), counts(std::move(counts)), taken(this->counts.size(), kNever) {
    for (std::size_t i = 0; i < this->counts.size(); ++i)
      if (this->counts[i] < blend.limits[i]) taken[i] = static_cast<double>(this->counts[i]);
  }

  // Writes the choice of this step; false if the chosen dataset has nothing left.
  bool take(const Blend& blend, std::size_t chosen) {
    if (taken[chosen] == kNever) return false;
    std::int64_t& count = counts[chosen];
    blend.dataset[step] = static_cast<std::int16_t>(chosen);
    blend.sample[step] = count;
    ++count;
    ++step;
    return true;
  }

  std::int64_t step;
  std::int64_t stop;
  std::vector<std::int64_t> counts;
  Lanes taken;  // the counts (exact below 2^53), or kNever where nothing is left
};

std::size_t furthest_behind(const Blend& blend, const Walk& walk) {
  const double position = static_cast<double>(std::max<std::int64_t>(walk.step, 1));
  std::size_t chosen = 0;
  double furthest = -kNever;
  for (std::size_t i = 0; i < walk.counts.size(); ++i) {
    const double error = blend.shares[i] * position - walk.taken[i];
    if (error > furthest) {
      furthest = error;
      chosen = i;
    }
  }
  return chosen;
}

bool advance(const Blend& blend, Walk& walk) {
  const std::size_t chosen = furthest_behind(blend, walk);
  if (!walk.take(blend, chosen)) return false;
  walk.taken[chosen] = walk.counts[chosen] < blend.limits[chosen] ? walk.taken[chosen] + 1.0 : kNever;
  return true;
}

bool advance_all(const Blend& blend, Walk& walk) {
  while (walk.step < walk.stop)
    if (!advance(blend, walk)) return false;
  return true;
}

#ifdef BLEND_WITH_AVX2

constexpr std::size_t kMostInRegisters = 4;  // vectors of one walk

struct alignas(32) OneHot {
  double lane[kMostInRegisters * kLanes];
};

constexpr auto kOneHot = [] {
  std::array<OneHot, kMostInRegisters * kLanes> rows{};
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i].lane[i] = 1.0;
  return rows;
}();

__attribute__((target("avx2"), always_inline)) inline __m256d over_lanes_max(__m256d x) {
  x = _mm256_max_pd(x, _mm256_permute2f128_pd(x, x, 1));
  return _mm256_max_pd(x, _mm256_permute_pd(x, 5));
}

__attribute__((target("avx2"), always_inline)) inline __m256d at_position(std::int64_t step) {
  return _mm256_set1_pd(static_cast<double>(step > 1 ? step : 1));
}

// Where the steps of several walks are written, and their counts.
template <std::size_t kWalks>
struct Together {
  Together(const Blend& blend, Walk* walks)
      : limits(blend.limits.data()), dataset(blend.dataset), sample(blend.sample) {
    steps = walks[0].stop - walks[0].step;
    for (std::size_t w = 0; w < kWalks; ++w) {
      steps = std::min(steps, walks[w].stop - walks[w].step);
      first[w] = walks[w].step;
      counts[w] = walks[w].counts.data();
    }
  }

  // Writes step s of walk w; true if the dataset has nothing left after it.
  __attribute__((always_inline)) bool take(std::size_t w, std::int64_t s, std::size_t chosen) {
    const std::int64_t count = counts[w][chosen]++;
    dataset[first[w] + s] = static_cast<std::int16_t>(chosen);
    sample[first[w] + s] = count;
    const bool last = count + 1 >= limits[chosen];
    if (__builtin_expect(last, 0)) good &= count < limits[chosen];
    return last;
  }

  const std::int64_t* const limits;
  std::int16_t* const dataset;
  std::int64_t* const sample;
  std::int64_t steps;
  std::array<std::int64_t, kWalks> first;
  std::array<std::int64_t*, kWalks> counts;
  bool good = true;  // false: a walk needed more than there is
};

// Few datasets.  What was taken stays in registers: a store to an address that depends on the
// choice would make every later load wait for it, and the walks would wait for one another.
template <std::size_t kVectors, std::size_t kWalks>
__attribute__((target("avx2"))) bool advance_few(const Blend& blend, Walk* walks) {
  Together<kWalks> at(blend, walks);
  const double* const shares = blend.shares.data();
  __m256d taken[kWalks][kVectors];
  for (std::size_t w = 0; w < kWalks; ++w)
    for (std::size_t v = 0; v < kVectors; ++v)
      taken[w][v] = _mm256_load_pd(walks[w].taken.data() + kLanes * v);
  for (std::int64_t s = 0; s < at.steps && at.good; ++s) {
    for (std::size_t w = 0; w < kWalks; ++w) {
      const __m256d position = at_position(at.first[w] + s);
      __m256d error[kVectors];
      for (std::size_t v = 0; v < kVectors; ++v)
        error[v] = _mm256_sub_pd(_mm256_mul_pd(_mm256_load_pd(shares + kLanes * v), position),
                                 taken[w][v]);
      __m256d most = error[0];
      for (std::size_t v = 1; v < kVectors; ++v) most = _mm256_max_pd(most, error[v]);
      most = over_lanes_max(most);
      unsigned equal = 0;
      for (std::size_t v = 0; v < kVectors; ++v)
        equal |= static_cast<unsigned>(
                     _mm256_movemask_pd(_mm256_cmp_pd(error[v], most, _CMP_EQ_OQ)))
                 << (kLanes * v);
      const auto chosen = static_cast<std::size_t>(__builtin_ctz(equal));  // the lowest number
      const double* const one_hot = kOneHot[chosen].lane;
      for (std::size_t v = 0; v < kVectors; ++v)
        taken[w][v] = _mm256_add_pd(taken[w][v], _mm256_load_pd(one_hot + kLanes * v));
      if (__builtin_expect(at.take(w, s, chosen), 0))
        for (std::size_t v = 0; v < kVectors; ++v)
          taken[w][v] = _mm256_blendv_pd(
              taken[w][v], _mm256_set1_pd(kNever),
              _mm256_cmp_pd(_mm256_load_pd(one_hot + kLanes * v), _mm256_setzero_pd(),
                            _CMP_NEQ_OQ));
    }
  }
  for (std::size_t w = 0; w < kWalks; ++w) {
    walks[w].step += at.steps;
    for (std::size_t v = 0; v < kVectors; ++v)
      _mm256_store_pd(walks[w].taken.data() + kLanes * v, taken[w][v]);
  }
  return at.good;
}

// Many datasets: what was taken stays in memory, and each lane remembers its own best.
template <std::size_t kWalks>
__attribute__((target("avx2"))) bool advance_many(const Blend& blend, Walk* walks) {
  Together<kWalks> at(blend, walks);
  const double* const shares = blend.shares.data();
  const std::size_t groups = blend.shares.groups();
  std::array<double*, kWalks> taken;
  for (std::size_t w = 0; w < kWalks; ++w) taken[w] = walks[w].taken.data();
  for (std::int64_t s = 0; s < at.steps && at.good; ++s) {
    for (std::size_t w = 0; w < kWalks; ++w) {
      const __m256d position = at_position(at.first[w] + s);
      __m256d best = _mm256_set1_pd(-kNever);
      __m256d which = _mm256_setzero_pd();
      __m256d number = _mm256_setr_pd(0, 1, 2, 3);
      for (std::size_t v = 0; v < groups; ++v) {
        const __m256d error =
            _mm256_sub_pd(_mm256_mul_pd(_mm256_load_pd(shares + kLanes * v), position),
                          _mm256_load_pd(taken[w] + kLanes * v));
        const __m256d further = _mm256_cmp_pd(error, best, _CMP_GT_OQ);
        best = _mm256_max_pd(best, error);
        which = _mm256_blendv_pd(which, number, further);
        number = _mm256_add_pd(number, _mm256_set1_pd(kLanes));
      }
      const __m256d equal = _mm256_cmp_pd(best, over_lanes_max(best), _CMP_EQ_OQ);
      // the lowest number is the highest of the negated ones
      const __m256d negated = _mm256_sub_pd(_mm256_setzero_pd(), which);
      const __m256d lowest =
          over_lanes_max(_mm256_blendv_pd(_mm256_set1_pd(-kNever), negated, equal));
      const auto chosen = static_cast<std::size_t>(-_mm256_cvtsd_f64(lowest));
      // a whole vector is written: one lane alone could not be forwarded to the next load of it
      double* const home = taken[w] + chosen / kLanes * kLanes;
      _mm256_store_pd(home, _mm256_add_pd(_mm256_load_pd(home),
                                          _mm256_load_pd(kOneHot[chosen % kLanes].lane)));
      if (__builtin_expect(at.take(w, s, chosen), 0)) taken[w][chosen] = kNever;
    }
  }
  for (std::size_t w = 0; w < kWalks; ++w) walks[w].step += at.steps;
  return at.good;
}

template <std::size_t kWalks>
bool advance_vectors(const Blend& blend, Walk* walks) {
  switch (blend.shares.groups()) {
    case 1: return advance_few<1, kWalks>(blend, walks);
    case 2: return advance_few<2, kWalks>(blend, walks);
    case 3: return advance_few<3, kWalks>(blend, walks);
    case 4: return advance_few<4, kWalks>(blend, walks);
    default: return advance_many<kWalks>(blend, walks);
  }
}

constexpr std::size_t kWalks = 4;
constexpr std::int64_t kWorthCutting = 1 << 14;  // steps per stretch

// Counts that a walk may have before `step`: the shares rounded so that they sum to `step`.
std::vector<std::int64_t> guess(const Blend& blend, std::size_t datasets, std::int64_t step) {
  std::vector<std::int64_t> counts(datasets);
  std::vector<double> rest(datasets);
  std::int64_t missing = step;
  for (std::size_t i = 0; i < datasets; ++i) {
    const double due = blend.shares[i] * static_cast<double>(step);
    counts[i] = std::min(static_cast<std::int64_t>(due), blend.limits[i]);
    rest[i] = counts[i] < blend.limits[i] ? due - static_cast<double>(counts[i]) : -kNever;
    missing -= counts[i];
  }
  if (missing < 0 || missing > static_cast<std::int64_t>(datasets)) return counts;
  std::vector<std::size_t> order(datasets);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return rest[a] > rest[b]; });
  for (std::int64_t i = 0; i < missing; ++i) ++counts[order[static_cast<std::size_t>(i)]];
  return counts;
}

// Goes on from `walk` over the next stretch, which was walked from `guessed` on and ended in
// `ended`, until the counts meet; false if nothing is left.  Leaves walk at that stretch's end.
bool join(const Blend& blend, Walk& walk, std::vector<std::int64_t> guessed, const Walk& ended) {
  walk.stop = ended.stop;
  std::int64_t apart = 0;  // sum of |true - guessed| counts
  for (std::size_t i = 0; i < guessed.size(); ++i) apart += std::abs(walk.counts[i] - guessed[i]);
  while (apart != 0 && walk.step < walk.stop) {
    const auto theirs = static_cast<std::size_t>(blend.dataset[walk.step]);
    if (!advance(blend, walk)) return false;
    const auto ours = static_cast<std::size_t>(blend.dataset[walk.step - 1]);
    if (ours == theirs) {
      ++guessed[ours];
      continue;
    }
    const auto distance = [&](std::size_t i) { return std::abs(walk.counts[i] - guessed[i]); };
    apart += (walk.counts[ours] > guessed[ours] ? 1 : -1);
    ++guessed[theirs];
    apart += distance(theirs) - std::abs(walk.counts[theirs] - (guessed[theirs] - 1));
  }
  if (walk.step < walk.stop) walk = ended;
  return true;
}

bool blend_in_stretches(const Blend& blend, std::size_t datasets) {
  const std::int64_t stretch = blend.size / static_cast<std::int64_t>(kWalks);
  std::vector<std::vector<std::int64_t>> guesses;
  std::vector<Walk> walks;
  for (std::size_t w = 0; w < kWalks; ++w) {
    const std::int64_t from = static_cast<std::int64_t>(w) * stretch;
    const std::int64_t to = w + 1 == kWalks ? blend.size : from + stretch;
    guesses.push_back(w == 0 ? std::vector<std::int64_t>(datasets) : guess(blend, datasets, from));
    walks.emplace_back(blend, from, to, guesses.back());
  }
  if (!advance_vectors<kWalks>(blend, walks.data())) return false;
  if (!advance_vectors<1>(blend, &walks.back())) return false;  // the last stretch may be longer
  Walk walk = walks.front();
  for (std::size_t w = 1; w < kWalks; ++w)
    if (!join(blend, walk, guesses[w], walks[w])) return false;
  return true;
}

#endif

void walk_blend(const Blend& blend, std::size_t datasets) {
  const auto from_the_start = [&] {
    return Walk(blend, 0, blend.size, std::vector<std::int64_t>(datasets));
  };
#ifdef BLEND_WITH_AVX2
  if (__builtin_cpu_supports("avx2") &&
      blend.size >= static_cast<std::int64_t>(kWalks) * kWorthCutting &&
      blend_in_stretches(blend, datasets))
    return;
#endif
  Walk walk = from_the_start();
  if (!advance_all(blend, walk)) throw std::out_of_range("no dataset has samples left");
}

py::tuple blend(const std::vector<double>& shares, std::vector<std::int64_t> limits, std::int64_t size) {
  if (shares.empty() || shares.size() != limits.size() || shares.size() > 32767 || size < 0)
    throw std::invalid_argument("shares and limits must be as many, 1 to 32767, and size >= 0");
  for (const double share : shares)
    if (!(share >= 0.0 && share <= 1.0)) throw std::invalid_argument("a share is not in [0, 1]");
  const std::size_t datasets = shares.size();
  Lanes lanes(datasets, 0.0);
  std::copy(shares.begin(), shares.end(), lanes.data());
  Array<std::int16_t> dataset(size);
  Array<std::int64_t> sample(size);
  const Blend asked{std::move(lanes), std::move(limits), size, dataset.mutable_data(),
                    sample.mutable_data()};
  {
    py::gil_scoped_release release;
    walk_blend(asked, datasets);
  }
  return py::make_tuple(dataset, sample);
}

// ---------------------------------------------------------------- shuffling

// numpy.random.RandomState's generator (MT19937, Matsumoto and Nishimura 1998), 624 words at once.
class Twister {
 public:
  static constexpr std::int64_t kWords = 624;

  Twister(std::uint32_t* key, std::int64_t position) : key_(key), position_(position) {
    temper();
  }

  std::int64_t position() const { return position_; }

  // Draws numbers in [0, i] for i = from, from - 1, ... while i > 0, `most` at a time, as
  // RandomState does: words masked to the bits of i until one is not above it.
  std::int64_t draw_down(std::int64_t from, std::int64_t most, std::uint32_t* drawn) {
    std::int64_t i = from;
    std::int64_t count = 0;
    while (i > 0 && count < most) {
      const auto mask = ~std::uint32_t{0} >> __builtin_clz(static_cast<std::uint32_t>(i));
      const std::int64_t same_mask = (mask >> 1) + std::int64_t{1};  // down to this i
      if (position_ == kWords) twist();
      std::int64_t p = position_;
      while (p < kWords && count < most && i >= same_mask) {
        const std::uint32_t value = words_[static_cast<std::size_t>(p++)] & mask;
        drawn[count] = value;
        const bool kept = value <= i;
        count += kept;
        i -= kept;
      }
      position_ = p;
    }
    return count;
  }

 private:
  void twist() {
    constexpr std::int64_t kShift = 397;
    const auto mixed = [&](std::int64_t a, std::int64_t b) {
      const std::uint32_t y = (key_[a] & 0x80000000U) | (key_[b] & 0x7fffffffU);
      return (y >> 1) ^ (-(y & 1U) & 0x9908b0dfU);
    };
    for (std::int64_t i = 0; i < kWords - kShift; ++i) key_[i] = key_[i + kShift] ^ mixed(i, i + 1);
    for (std::int64_t i = kWords - kShift; i < kWords - 1; ++i)
      key_[i] = key_[i + kShift - kWords] ^ mixed(i, i + 1);
    key_[kWords - 1] = key_[kShift - 1] ^ mixed(kWords - 1, 0);
    position_ = 0;
    temper();
  }

  void temper() {
    for (std::size_t i = 0; i < kWords; ++i) {
      std::uint32_t y = key_[i];
      y ^= y >> 11;
      y ^= (y << 7) & 0x9d2c5680U;
      y ^= (y << 15) & 0xefc60000U;
      words_[i] = y ^ (y >> 18);
    }
  }

  std::uint32_t* key_;
  std::int64_t position_;
  std::array<std::uint32_t, kWords> words_;
};

template <typename T>
std::int64_t shuffle_values(T* values, std::int64_t size, std::uint32_t* key,
                            std::int64_t position) {
  constexpr std::int64_t kAhead = 256;
  Twister twister(key, position);
  std::array<std::uint32_t, kAhead + 1> drawn;  // a rejected number may stand behind the last
  std::int64_t i = size - 1;
  while (i > 0) {
    const std::int64_t count = twister.draw_down(i, kAhead, drawn.data());
    for (std::int64_t n = 0; n < count; ++n)
      __builtin_prefetch(values + drawn[static_cast<std::size_t>(n)], 1);
    for (std::int64_t n = 0; n < count; ++n, --i)
      std::swap(values[i], values[drawn[static_cast<std::size_t>(n)]]);
  }
  return twister.position();
}

// Shuffles in place as RandomState.shuffle; key is changed too, the new position is returned.
template <typename T>
std::int64_t shuffle(py::array_t<T, py::array::c_style>& values,
                     py::array_t<std::uint32_t, py::array::c_style>& key, std::int64_t position) {
  if (values.ndim() != 1 || values.size() > std::numeric_limits<std::uint32_t>::max())
    throw std::invalid_argument("values must be one-dimensional and fewer than 2^32");
  if (key.size() != Twister::kWords || position < 0 || position > Twister::kWords)
    throw std::invalid_argument("not a state of MT19937");
  T* data = values.mutable_data();
  std::uint32_t* key_data = key.mutable_data();
  py::gil_scoped_release release;
  return shuffle_values(data, values.size(), key_data, position);
}

}  // namespace

PYBIND11_MODULE(_index_helpers, module) {
  module.doc() = "Sample, blend and shuffle indices; the twins of megatron_lite.data.indices.";
  module.def("sample_index_int32", &sample_index<std::int32_t>, py::arg("sizes"),
             py::arg("documents"), py::arg("seq_length"), py::arg("num_samples"));
  module.def("sample_index_int64", &sample_index<std::int64_t>, py::arg("sizes"),
             py::arg("documents"), py::arg("seq_length"), py::arg("num_samples"));
  module.def("blend", &blend, py::arg("shares"), py::arg("limits"), py::arg("size"));
  module.def("shuffle_4", &shuffle<std::uint32_t>, py::arg("values").noconvert(),
             py::arg("key").noconvert(), py::arg("position"));
  module.def("shuffle_8", &shuffle<std::uint64_t>, py::arg("values").noconvert(),
             py::arg("key").noconvert(), py::arg("position"));
}

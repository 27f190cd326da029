// Classifies image files with a student that export.py compiled into an AOTInductor package: libtorch, no Python.
//
//   classify student.pt2 photo.jpg icon.png ... [--top 3] [--device cpu|cuda] [--threads N]
//   classify student.pt2 --benchmark [--batch_sizes 1 8 32] [--device cpu|cuda] [--threads N]
//
// Images, PNG and JPEG, become what common/images.py makes of them: upright, 8 bits, on white, the central square,
// resized with antialiasing. A line of output: PATH, then CLASS and PROBABILITY of the likeliest, all tab-separated.

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/randint.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#define STB_IMAGE_IMPLEMENTATION
#define STBI_ONLY_JPEG
#define STBI_ONLY_PNG
#define STBI_NO_STDIO
#include <stb_image.h>

using Bytes = std::vector<uint8_t>;

// A mistake that the user can mend: one message, exit code 2.
struct UserError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// RGB pixels [height, width, 3].
struct Image {
  int width, height;
  Bytes pixels;
};

// ---------------------------------------------------------------------------------------------------- image files

std::string_view view(const Bytes& bytes) { return {reinterpret_cast<const char*>(bytes.data()), bytes.size()}; }

uint32_t number(std::string_view bytes, size_t at, int count, bool big_endian = true) {
  uint32_t value = 0;
  for (int i = 0; i < count && at + count <= bytes.size(); ++i)
    value |= uint32_t{uint8_t(bytes[at + i])} << 8 * (big_endian ? count - 1 - i : i);
  return value;
}

// The orientation, 1 to 8, that TIFF data give; another number where what they give is none, 0 where they give nothing.
uint32_t exif_orientation(std::string_view tiff) {
  constexpr std::string_view prefix("Exif\0\0", 6);
  while (tiff.starts_with(prefix)) tiff.remove_prefix(prefix.size());
  uint32_t found = 0;
  bool big = number(tiff, 0, 1) == 'M';
  size_t directory = number(tiff, 4, 4, big);
  for (uint32_t i = 0; i < number(tiff, directory, 2, big); ++i) {
    size_t entry = directory + 2 + 12 * size_t{i};
    if (number(tiff, entry, 2, big) != 0x0112) continue;
    int type = number(tiff, entry + 2, 2, big), size = type == 3 || type == 8 ? 2 : type == 4 || type == 9 ? 4 : 0;
    bool here = uint64_t{number(tiff, entry + 4, 4, big)} * size <= 4;
    found = size ? number(tiff, here ? entry + 8 : number(tiff, entry + 8, 4, big), size, big) : 9;
  }
  return found;
}

// The same of an XMP packet: an attribute or an element.
uint32_t xmp_orientation(std::string_view xmp) {
  constexpr std::string_view name = "tiff:Orientation";
  for (size_t at = 0; (at = xmp.find(name, at)) != xmp.npos;) {
    at += name.size();
    size_t value = at + (xmp.substr(at, 2) == "=\"" ? 2 : xmp.substr(at, 1) == ">" ? 1 : xmp.size());
    if (value < xmp.size() && '0' <= xmp[value] && xmp[value] <= '9') return xmp[value] - '0';
  }
  return 0;
}

// Where an image file says how it is to be turned.
struct Notes {
  std::string exif, xmp;

  // 1 to 8; any other number turns nothing. As in Pillow, XMP is asked where EXIF does not say.
  uint32_t orientation() const {
    uint32_t found = exif_orientation(exif);
    return found ? found : xmp_orientation(xmp);
  }
};

// PNG's checksum (ISO 3309).
uint32_t checksum(std::string_view bytes) {
  uint32_t sum = ~0u;
  for (char byte : bytes) {
    sum ^= uint8_t(byte);
    for (int bit = 0; bit < 8; ++bit) sum = sum >> 1 ^ (sum & 1 ? 0xEDB88320 : 0);
  }
  return ~sum;
}

// The keyword and text of a PNG's tEXt, zTXt or iTXt chunk.
std::pair<std::string, std::string> text_of(std::string_view kind, std::string_view data) {
  auto next = [&data] {  // what comes before the next zero
    std::string_view part = data.substr(0, data.find('\0'));
    data.remove_prefix(std::min(data.size(), part.size() + 1));
    return std::string(part);
  };
  std::string keyword = next();
  bool compressed = kind == "zTXt" || (kind == "iTXt" && number(data, 0, 1) == 1);
  if (kind != "tEXt") data.remove_prefix(std::min<size_t>(data.size(), kind == "zTXt" ? 1 : 2));  // flag and method
  if (kind == "iTXt") next(), next();  // language, translated keyword
  if (!compressed) return {keyword, std::string(data)};
  int size = 0;
  std::unique_ptr<char, decltype(&std::free)> text(stbi_zlib_decode_malloc(data.data(), int(data.size()), &size),
                                                  &std::free);
  return {keyword, text ? std::string(text.get(), size) : ""};
}

// The bytes of a "Raw profile": three lines, then hexadecimal digits.
std::string raw_profile(const std::string& text) {
  std::string bytes, digits;
  std::istringstream lines(text);
  for (int i = 0; std::getline(lines, digits); ++i)
    for (size_t at = 0; i >= 3 && at + 2 <= digits.size(); at += 2)
      bytes.push_back(char(std::stoi(digits.substr(at, 2), nullptr, 16)));
  return bytes;
}

// Reads the chunks of a PNG file up to its end, what follows is not of the image, and checks the checksums, which the
// decoder ignores.
Notes read_png(std::string_view bytes) {
  Notes notes;
  std::string profile;
  for (size_t at = 8, end; (end = at + 8 + number(bytes, at, 4)) + 4 <= bytes.size(); at = end + 4) {
    std::string_view kind = bytes.substr(at + 4, 4), data = bytes.substr(at + 8, end - at - 8);
    if (checksum(bytes.substr(at + 4, end - at - 4)) != number(bytes, end, 4))
      throw std::runtime_error("wrong checksum");
    if (kind == "IEND") break;
    if (kind == "eXIf") notes.exif = data;
    if (!kind.ends_with("Xt") && !kind.ends_with("XT")) continue;
    auto [keyword, text] = text_of(kind, data);
    if (keyword == "XML:com.adobe.xmp") notes.xmp = text;
    if (keyword == "Raw profile type exif") profile = raw_profile(text);
  }
  if (notes.exif.empty()) notes.exif = profile;
  return notes;
}

// Reads the segments of a JPEG file up to the image's own. Four colours without Adobe's marker get one: they are printed
// colours, inverted, as Pillow and the programs that write them have it.
Notes read_jpeg(Bytes& file) {
  constexpr std::string_view exif("Exif\0\0", 6), xmp("http://ns.adobe.com/xap/1.0/\0", 29), adobe("Adobe");
  std::string_view bytes = view(file);
  Notes notes;
  uint32_t colours = 0, marker = 0;
  bool marked = false;
  for (size_t at = 2; (marker = number(bytes, at, 2)) >= 0xFF00 && marker != 0xFFDA;) {
    size_t length = std::max(2u, number(bytes, at + 2, 2));
    std::string_view data = bytes.substr(std::min(bytes.size(), at + 4), length - 2);
    if (marker == 0xFFE1 && data.starts_with(exif)) notes.exif += data.substr(exif.size());
    if (marker == 0xFFE1 && data.starts_with(xmp)) notes.xmp = data.substr(xmp.size());
    if (marker == 0xFFEE && data.starts_with(adobe)) marked = true;
    if (marker >= 0xFFC0 && marker <= 0xFFC2) colours = number(data, 5, 1);
    at += marker == 0xFFFF ? 1 : 2 + length;  // 0xFF may be repeated before a marker
  }
  constexpr std::string_view segment("\xFF\xEE\0\x0E" "Adobe\0\x64\0\0\0\0\0", 16);
  if (colours == 4 && !marked) file.insert(file.begin() + 2, segment.begin(), segment.end());
  return notes;
}

// Turns an image upright: orientations from 5 swap rows and columns, then most mirror one or both.
Image upright(Image image, uint32_t orientation) {
  if (orientation < 2 || orientation > 8) return image;
  bool swap = orientation >= 5;
  bool mirror_x = orientation == 2 || orientation == 3 || orientation == 6 || orientation == 7;
  bool mirror_y = orientation == 3 || orientation == 4 || orientation == 7 || orientation == 8;
  Image turned{swap ? image.height : image.width, swap ? image.width : image.height, Bytes(image.pixels.size())};
  for (int y = 0; y < turned.height; ++y)
    for (int x = 0; x < turned.width; ++x) {
      int column = mirror_x ? turned.width - 1 - x : x, row = mirror_y ? turned.height - 1 - y : y;
      if (swap) std::swap(column, row);
      std::copy_n(&image.pixels[3 * (size_t(row) * image.width + column)], 3,
                  &turned.pixels[3 * (size_t(y) * turned.width + x)]);
    }
  return turned;
}

Image decode(Bytes bytes) {
  bool png = number(view(bytes), 0, 4) == 0x89504E47, jpeg = number(view(bytes), 0, 2) == 0xFFD8;
  if (!png && !jpeg) throw std::runtime_error("neither PNG nor JPEG");
  Notes notes = png ? read_png(view(bytes)) : read_jpeg(bytes);
  int width, height, channels, size = int(bytes.size());
  if (!stbi_info_from_memory(bytes.data(), size, &width, &height, &channels))
    throw std::runtime_error(stbi_failure_reason());
  if (int64_t{width} * height > 178'956'970) throw std::runtime_error("too many pixels");  // Pillow's limit
  Image image{width, height, Bytes(3 * size_t(width) * height)};
  uint8_t* to = image.pixels.data();
  auto release = [](void* memory) { stbi_image_free(memory); };
  if (channels == 1 && stbi_is_16_bit_from_memory(bytes.data(), size)) {
    std::unique_ptr<uint16_t, decltype(release)> grey(
        stbi_load_16_from_memory(bytes.data(), size, &width, &height, &channels, 1), release);
    if (!grey) throw std::runtime_error(stbi_failure_reason());
    for (size_t i = 0; i < image.pixels.size(); ++i) to[i] = uint8_t(grey.get()[i / 3] / 257);
  } else {
    std::unique_ptr<uint8_t, decltype(release)> rgba(
        stbi_load_from_memory(bytes.data(), size, &width, &height, &channels, 4), release);
    if (!rgba) throw std::runtime_error(stbi_failure_reason());
    const uint8_t* from = rgba.get();
    for (const uint8_t* end = from + 4 * size_t(width) * height; from != end; from += 4)
      for (int c = 0; c < 3; ++c) *to++ = uint8_t((from[c] * from[3] + 255 * (255 - from[3]) + 127) / 255);  // on white
  }
  return upright(std::move(image), notes.orientation());
}

// -------------------------------------------------------------------------------------------------------- resizing

// The inputs from `first` on that make one output, and their weights in units of 2^-22.
struct Taps {
  int first;
  std::vector<int> weights;
};

// Bicubic interpolation (Keys, a = -0.5) of `count` outputs from the interval [begin, begin + length) of `inputs`
// samples, widened to the outputs' distance where that is larger. Samples beside the interval count where they exist.
std::vector<Taps> bicubic(int inputs, double begin, double length, int count) {
  double step = length / count, stretch = std::max(step, 1.0);
  std::vector<Taps> outputs;
  for (int i = 0; i < count; ++i) {
    double center = begin + (i + 0.5) * step, sum = 0;
    int first = std::max(0, int(center - 2 * stretch + 0.5)), last = std::min(inputs, int(center + 2 * stretch + 0.5));
    std::vector<double> weights;
    for (int j = first; j < last; ++j) {
      double x = std::abs((j + 0.5 - center) / stretch);
      weights.push_back(x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0);
      sum += weights.back();
    }
    outputs.push_back({first, {}});
    for (double weight : weights) outputs.back().weights.push_back(int(std::lround(weight / sum * (1 << 22))));
  }
  return outputs;
}

// [outer, inputs, inner] to [outer, outputs, inner].
Bytes resample(const Bytes& from, size_t outer, size_t inputs, size_t inner, const std::vector<Taps>& taps) {
  Bytes to;
  to.reserve(outer * taps.size() * inner);
  for (size_t o = 0; o < outer; ++o)
    for (const auto& [first, weights] : taps)
      for (size_t c = 0; c < inner; ++c) {
        int sum = 1 << 21;  // rounds
        const uint8_t* sample = &from[(o * inputs + first) * inner + c];
        for (size_t j = 0; j < weights.size(); ++j) sum += weights[j] * sample[j * inner];
        to.push_back(uint8_t(std::clamp(sum >> 22, 0, 255)));
      }
  return to;
}

// The central square of an image file as pixels [height, width, 3], to the bit as Pillow 13 resizes: 8 bits in between,
// and rows first where the height shrinks by more than twice as many pixels as the width.
Bytes load_image(const std::string& path, int height, int width) try {
  std::ifstream file(path, std::ios::binary);
  if (!file || std::filesystem::is_directory(path)) throw UserError(path + ": no such file");
  Image image = decode(Bytes(std::istreambuf_iterator<char>(file), {}));
  int side = std::min(image.width, image.height);
  double left = (image.width - side) / 2.0, top = (image.height - side) / 2.0;
  auto columns = bicubic(image.width, left, side, width), rows = bicubic(image.height, top, side, height);
  if (image.height > height && image.height - height > 2 * (image.width - width))
    return resample(resample(image.pixels, 1, image.height, 3 * image.width, rows), height, image.width, 3, columns);
  return resample(resample(image.pixels, image.height, image.width, 3, columns), 1, image.height, 3 * width, rows);
} catch (const UserError&) {
  throw;
} catch (const std::exception& error) {
  throw UserError(path + " cannot be read as an image (" + error.what() + "): replace or remove it.");
}

// ----------------------------------------------------------------------------------------------------- the student

struct Student {
  std::vector<std::string> classes;
  int height, width, smallest_batch, largest_batch;
  std::string device;
  std::unique_ptr<torch::inductor::AOTIModelPackageLoader> package;

  // Images uint8 [B, height, width, 3] to probabilities [B, classes], both on the CPU.
  at::Tensor operator()(const at::Tensor& images) const { return package->run({images.to(device)}).at(0).cpu(); }
};

Student load_student(const std::string& path, const std::string& wanted_device) try {
  using torch::inductor::AOTIModelPackageLoader;
  if (!std::filesystem::is_regular_file(path)) throw UserError(path + ": no such file. export.py writes it.");
  auto metadata = AOTIModelPackageLoader::load_metadata_from_package(path, "model");
  auto entry = [&metadata](const std::string& key) {
    if (!metadata.count(key)) throw std::runtime_error("its metadata lack " + key);
    return metadata[key];
  };
  Student student{};
  student.device = entry("AOTI_DEVICE_KEY");
  if (!wanted_device.empty() && wanted_device != student.device)
    throw UserError(path + " was compiled for " + student.device + ", not " + wanted_device + ": export it again.");
  std::istringstream classes(entry("classes"));
  for (std::string name; std::getline(classes, name);) student.classes.push_back(name);
  std::istringstream(entry("input_size")) >> student.height >> student.width;
  std::istringstream(entry("batch_sizes")) >> student.smallest_batch >> student.largest_batch;
  if (student.device == "cuda" && !at::hasCUDA())
    throw UserError(path + " was compiled for CUDA, and there is no GPU here, or a libtorch without CUDA.");
  student.package = std::make_unique<AOTIModelPackageLoader>(path);
  return student;
} catch (const UserError&) {
  throw;
} catch (const std::exception& error) {
  auto* torch_error = dynamic_cast<const c10::Error*>(&error);
  std::string reason = torch_error ? torch_error->what_without_backtrace() : error.what();
  throw UserError(path + " is no package of export.py for this machine and libtorch (" +
                  reason.substr(0, reason.find('\n')) + "): export it here.");
}

// Prints the answers on all files that can be read; false if some cannot.
bool classify(const Student& student, const std::vector<std::string>& paths, size_t top) {
  bool all_read = true;
  size_t bytes = size_t(student.height) * student.width * 3, step = std::min(student.largest_batch, 32);
  if (student.smallest_batch > 1) step = student.smallest_batch;
  for (size_t start = 0; start < paths.size(); start += step) {
    Bytes pixels;
    std::vector<std::string> read;
    for (size_t i = start; i < std::min(start + step, paths.size()); ++i) try {
        Bytes image = load_image(paths[i], student.height, student.width);
        pixels.insert(pixels.end(), image.begin(), image.end());
        read.push_back(paths[i]);
      } catch (const UserError& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        all_read = false;
      }
    if (read.empty()) continue;
    int64_t count = std::max(int64_t(read.size()), int64_t{student.smallest_batch});
    pixels.resize(count * bytes);  // a package of fixed batch size gets black images where some are missing
    at::Tensor probabilities =
        student(at::from_blob(pixels.data(), {count, student.height, student.width, 3}, at::kByte)).contiguous();
    std::vector<int> order(student.classes.size());
    if (probabilities.size(1) != int64_t(order.size())) throw UserError("the package misnames its classes");
    for (size_t i = 0; i < read.size(); ++i) {
      const float* p = probabilities.const_data_ptr<float>() + i * order.size();
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [p](int a, int b) { return p[a] > p[b]; });
      std::printf("%s", read[i].c_str());
      for (size_t k = 0; k < std::min(top, order.size()); ++k)
        std::printf("\t%s\t%.6f", student.classes[order[k]].c_str(), p[order[k]]);
      std::printf("\n");
    }
  }
  return all_read;
}

// ------------------------------------------------------------------------------------------------------- benchmark

double percentile(const std::vector<double>& sorted, double percent) {
  double at = percent / 100 * double(sorted.size() - 1);
  size_t below = size_t(at), above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (at - double(below)) * (sorted[above] - sorted[below]);
}

// Times calls in turns of a tenth of a second, the first five of each uncounted, until there are 200 or two seconds of
// them, as `benchmark` in common/runtimes/latency.py does. A call takes pixels on the CPU and ends with probabilities
// there.
void benchmark(const Student& student, const std::vector<int>& batch_sizes) {
  auto now = [] { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); };
  std::printf("Latency on %s, %d threads of %u cores\n\n", student.device.c_str(), at::get_num_threads(),
              std::thread::hardware_concurrency());
  std::printf("| batch | calls | median ms | p90 ms | p99 ms | images/s |\n|---|---|---|---|---|---|\n");
  for (int batch : batch_sizes) {
    at::Tensor images = at::randint(256, {batch, student.height, student.width, 3}, at::kByte);
    std::vector<double> seconds;
    for (double sum = 0; seconds.size() < 200 && sum < 2;) {
      for (int i = 0; i < 5; ++i) student(images);
      for (double before = now(), end = before + 0.1; before < end; before = now()) {
        student(images);
        seconds.push_back(now() - before);
        sum += seconds.back();
      }
    }
    std::sort(seconds.begin(), seconds.end());
    double median = percentile(seconds, 50);
    std::printf("| %d | %zu | %.3f | %.3f | %.3f | %.0f |\n", batch, seconds.size(), 1e3 * median,
                1e3 * percentile(seconds, 90), 1e3 * percentile(seconds, 99), batch / median);
    std::fflush(stdout);
  }
}

// ----------------------------------------------------------------------------------------------------- command line

const char* usage =
    "usage: classify student.pt2 IMAGE ... [--top 3] [--device cpu|cuda] [--threads N]\n"
    "       classify student.pt2 --benchmark [--batch_sizes 1 8 32] [--device cpu|cuda] [--threads N]\n";

struct Options {
  std::string package, device;
  std::vector<std::string> images;
  int top = 3, threads = 0;
  bool benchmark = false;
  std::vector<int> batch_sizes;
};

// The whole text as a number of at least 1, or 0.
int positive(const std::string& text) {
  int value = 0;
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size() && value > 0 ? value : 0;
}

Options parse(const std::vector<std::string>& arguments) {
  Options options;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& name = arguments[i];
    std::string value = i + 1 < arguments.size() ? arguments[i + 1] : "";
    if (name == "--benchmark") {
      options.benchmark = true;
    } else if (name == "--top" || name == "--threads") {
      int number = positive(value);
      if (!number) throw UserError(name + " takes a number of at least 1, not '" + value + "'");
      (name == "--top" ? options.top : options.threads) = number;
      ++i;
    } else if (name == "--device") {
      if (value != "cpu" && value != "cuda") throw UserError("--device takes cpu or cuda, not '" + value + "'");
      options.device = value;
      ++i;
    } else if (name == "--batch_sizes") {
      for (; i + 1 < arguments.size() && positive(arguments[i + 1]); ++i)
        options.batch_sizes.push_back(positive(arguments[i + 1]));
      if (options.batch_sizes.empty()) throw UserError(name + " takes numbers of at least 1, not '" + value + "'");
    } else if (name.starts_with("--")) {
      throw UserError(name + ": no such option");
    } else if (options.package.empty()) {
      options.package = name;
    } else {
      options.images.push_back(name);
    }
  }
  if (options.package.empty() || (options.images.empty() && !options.benchmark))
    throw UserError(std::string("give a package, and images or --benchmark\n") + usage);
  return options;
}

int main(int argc, char** argv) try {
  std::vector<std::string> arguments(argv + 1, argv + argc);
  if (std::find(arguments.begin(), arguments.end(), "--help") != arguments.end()) {
    std::fputs(usage, stdout);
    return 0;
  }
  Options options = parse(arguments);
  if (options.threads) at::set_num_threads(options.threads);
  c10::InferenceMode no_gradients;
  Student student = load_student(options.package, options.device);
  if (options.batch_sizes.empty()) options.batch_sizes = {student.smallest_batch};
  for (int batch : options.batch_sizes)
    if (batch < student.smallest_batch || batch > student.largest_batch)
      throw UserError("--batch_sizes " + std::to_string(batch) + ": " + options.package + " takes " +
                      std::to_string(student.smallest_batch) + " to " + std::to_string(student.largest_batch));
  bool all_read = classify(student, options.images, options.top);
  if (options.benchmark) benchmark(student, options.batch_sizes);
  return all_read ? 0 : 2;
} catch (const UserError& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 2;
} catch (const std::exception& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 1;
}

// JPEG with libjpeg, PNG with libpng, and the orientation in their EXIF data; see image.h.
#include "image.h"

#include <jpeglib.h>
#include <png.h>
// after jpeglib.h
#include <jerror.h>

#include <csetjmp>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>

namespace {

using Bytes = std::vector<uint8_t>;

/// Both libraries return from an error by a jump to where they were called; what is destroyed there is made before.
struct Failure {
  std::jmp_buf jump;
  char message[JMSG_LENGTH_MAX > 256 ? JMSG_LENGTH_MAX : 256];
};

struct JpegError : jpeg_error_mgr {
  Failure failure;
};

[[noreturn]] void jpeg_failed(j_common_ptr info) {
  auto& error = *static_cast<JpegError*>(info->err);
  error.format_message(info, error.failure.message);
  std::longjmp(error.failure.jump, 1);
}

void jpeg_message(j_common_ptr info, int) {
  if (info->err->msg_code == JWRN_JPEG_EOF) jpeg_failed(info);  // the rest would be grey
}

/// False, with the message in error.failure, where the file is damaged.
bool decode_jpeg(const Bytes& file, jpeg_decompress_struct& info, JpegError& error, Image& image) {
  if (setjmp(error.failure.jump)) return false;
  jpeg_mem_src(&info, file.data(), file.size());
  jpeg_read_header(&info, TRUE);
  if (info.jpeg_color_space != JCS_GRAYSCALE && info.num_components != 3) {
    std::strcpy(error.failure.message, "expected grey or RGB, got another number of channels");
    return false;
  }
  info.out_color_space = info.num_components == 1 ? JCS_GRAYSCALE : JCS_RGB;
  jpeg_start_decompress(&info);
  image = Image(info.output_width, info.output_height, info.output_components);
  while (info.output_scanline < info.output_height) {
    JSAMPROW row = image.at(0, info.output_scanline);
    jpeg_read_scanlines(&info, &row, 1);
  }
  jpeg_finish_decompress(&info);
  return true;
}

Image read_jpeg(const Bytes& file) {
  jpeg_decompress_struct info;
  JpegError error;
  info.err = jpeg_std_error(&error);
  error.error_exit = jpeg_failed;
  error.emit_message = jpeg_message;
  jpeg_create_decompress(&info);
  Image image;
  const bool whole = decode_jpeg(file, info, error, image);
  jpeg_destroy_decompress(&info);
  if (!whole) throw std::runtime_error(error.failure.message);
  return image;
}

struct PngSource {
  const Bytes& file;
  size_t position;
};

[[noreturn]] void png_failed(png_structp png, png_const_charp message) {
  auto& failure = *static_cast<Failure*>(png_get_error_ptr(png));
  std::strncpy(failure.message, message, sizeof failure.message - 1);
  std::longjmp(failure.jump, 1);
}

void png_read(png_structp png, png_bytep to, size_t count) {
  auto& source = *static_cast<PngSource*>(png_get_io_ptr(png));
  if (count > source.file.size() - source.position) png_error(png, "the file ends too early");
  std::memcpy(to, source.file.data() + source.position, count);
  source.position += count;
}

bool decode_png(png_structp png, png_infop info, Failure& failure, Image& image, std::vector<png_bytep>& rows) {
  if (setjmp(failure.jump)) return false;
  png_read_info(png, info);
  if (png_get_color_type(png, info) == PNG_COLOR_TYPE_PALETTE) png_set_palette_to_rgb(png);
  if (png_get_color_type(png, info) == PNG_COLOR_TYPE_GRAY) png_set_expand_gray_1_2_4_to_8(png);
  png_set_strip_16(png);
  png_set_strip_alpha(png);
  png_set_interlace_handling(png);
  png_read_update_info(png, info);
  image = Image(png_get_image_width(png, info), png_get_image_height(png, info), png_get_channels(png, info));
  for (int64_t y = 0; y < image.height; ++y)
    rows.push_back(image.at(0, y));
  png_read_image(png, rows.data());
  png_read_end(png, nullptr);
  return true;
}

Image read_png(const Bytes& file) {
  Failure failure = {};
  PngSource source = {file, 0};
  png_structp png =
      png_create_read_struct(PNG_LIBPNG_VER_STRING, &failure, png_failed, [](png_structp, png_const_charp) {});
  png_infop info = png ? png_create_info_struct(png) : nullptr;
  if (!info) throw std::runtime_error("libpng does not start");
  png_set_read_fn(png, &source, png_read);
  Image image;
  std::vector<png_bytep> rows;
  const bool whole = decode_png(png, info, failure, image, rows);
  png_destroy_read_struct(&png, &info, nullptr);
  if (!whole) throw std::runtime_error(failure.message);
  return image;
}

/// An unsigned number of `count` bytes; 0 beyond the end.
uint32_t number(const Bytes& file, size_t at, int count, bool little_endian = false) {
  if (at + count > file.size()) return 0;
  uint32_t value = 0;
  for (int i = 0; i < count; ++i)
    value = value << 8 | file[at + (little_endian ? count - 1 - i : i)];
  return value;
}

bool says(const Bytes& file, size_t at, std::string_view text) {
  return at + text.size() <= file.size() && std::memcmp(&file[at], text.data(), text.size()) == 0;
}

/// Where the EXIF data starts in a JPEG's APP1 segment or a PNG's eXIf chunk; the file's end where there are none.
size_t find_exif(const Bytes& file) {
  if (file[0] == 0xff)
    for (size_t at = 2; at + 4 < file.size() && file[at] == 0xff && file[at + 1] != 0xda;
         at += 2 + number(file, at + 2, 2)) {
      if (file[at + 1] == 0xe1 && says(file, at + 4, std::string_view("Exif\0\0", 6))) return at + 10;
    }
  else
    for (size_t at = 8; at + 8 < file.size(); at += 12 + number(file, at, 4))
      if (says(file, at + 4, "eXIf")) return at + 8;
  return file.size();
}

/// 1 (upright) to 8, as EXIF numbers them.
uint32_t orientation(const Bytes& file) {
  const size_t start = find_exif(file);
  const bool little_endian = says(file, start, "II");
  const size_t directory = start + number(file, start + 4, 4, little_endian);
  const uint32_t entries = number(file, directory, 2, little_endian);
  for (uint32_t i = 0; i < entries; ++i) {
    const size_t entry = directory + 2 + 12 * i;
    if (number(file, entry, 2, little_endian) == 0x112) return number(file, entry + 8, 2, little_endian);
  }
  return 1;
}

/// The image that a camera held in this way saw.
Image upright(const Image& image, uint32_t orientation) {
  if (orientation < 2 || orientation > 8) return image;
  const bool transposed = orientation >= 5;
  const bool mirrored = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;  // in the file
  const bool flipped = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
  Image turned(transposed ? image.height : image.width, transposed ? image.width : image.height, image.channels);
  for (int64_t y = 0; y < turned.height; ++y)
    for (int64_t x = 0; x < turned.width; ++x) {
      const int64_t from_x = transposed ? y : x, from_y = transposed ? x : y;
      std::memcpy(turned.at(x, y),
                  image.at(mirrored ? image.width - 1 - from_x : from_x, flipped ? image.height - 1 - from_y : from_y),
                  image.channels);
    }
  return turned;
}

}  // namespace

Image read_image(const std::string& path) {
  if (!std::filesystem::is_regular_file(path)) throw std::runtime_error(path + ": no such image file");
  std::ifstream stream(path, std::ios::binary);
  const Bytes file{std::istreambuf_iterator<char>(stream), {}};
  const bool jpeg = says(file, 0, "\xff\xd8\xff"), png = says(file, 0, "\x89PNG\r\n\x1a\n");
  if (!jpeg && !png) throw std::runtime_error(path + ": expected a JPEG or PNG image");
  try {
    return upright(jpeg ? read_jpeg(file) : read_png(file), orientation(file));
  } catch (const std::exception& error) {
    throw std::runtime_error(path + ": not a readable image: " + error.what());
  }
}

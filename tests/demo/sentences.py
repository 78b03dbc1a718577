"""What the bundled speech says, and who says it: the table that `make_speech.py` speaks.

Kept apart from the code that speaks it, because it is read and corrected by people who know the languages.
"""

from typing import NamedTuple


class Voice(NamedTuple):
    """An espeak-ng voice with a name: `speed` in words per minute, `pitch` from 0 to 99."""

    name: str
    manner: str
    language: str
    espeak: str
    speed: int
    pitch: int


class Line(NamedTuple):
    """One clip of one speaker. A `clone` line is spoken after the speaker's first clip of the split, as a reference."""

    voice: str
    text: str
    clone: bool = False


class Dialogue(NamedTuple):
    """One clip of two speakers, one after the other; `clone` as in `Line`, with a reference for each speaker."""

    first: Line
    second: Line
    clone: bool = False


# Mandarin takes the pinyin voice: it reads Han characters too, where `cmn` spells their pinyin in English letters.
VOICES = {
    "en_ada": Voice("Ada", "feminine", "en", "en-us+f2", 185, 55),
    "en_ben": Voice("Ben", "masculine", "en", "en-gb+m3", 180, 40),
    "en_cleo": Voice("Cleo", "feminine", "en", "en-gb-x-rp+f4", 190, 65),
    "vi_lan": Voice("Lan", "feminine", "vi", "vi+f2", 200, 60),
    "vi_minh": Voice("Minh", "masculine", "vi", "vi+m3", 190, 45),
    "vi_hoa": Voice("Hoa", "feminine", "vi", "vi-vn-x-south+f3", 195, 55),
    "ar_salma": Voice("Salma", "feminine", "ar", "ar+f2", 180, 55),
    "ar_karim": Voice("Karim", "masculine", "ar", "ar+m1", 175, 40),
    "ar_nour": Voice("Nour", "feminine", "ar", "ar+f5", 185, 60),
    "cmn_mei": Voice("Mei", "feminine", "cmn", "cmn-latn-pinyin+f3", 210, 60),
    "cmn_bo": Voice("Bo", "masculine", "cmn", "cmn-latn-pinyin+m2", 205, 45),
    "cmn_lin": Voice("Lin", "feminine", "cmn", "cmn-latn-pinyin+f5", 215, 65),
}

TRAIN: tuple[Line | Dialogue, ...] = (
    Line("en_ada", "The kettle is singing on the stove."),
    Line("en_ben", "My brother repairs old clocks."),
    Line("en_cleo", "Every window looks out on the sea."),
    Line("en_ada", "We planted beans along the wall."),
    Line("en_ben", "The last train leaves at nine."),
    Line("en_cleo", "She keeps her letters in a tin box."),
    Line("en_ada", "Rain is coming over the hills."),
    Line("en_ben", "Please close the garden gate."),
    Line("en_ada", "The baker opens before the sun.", clone=True),
    Line("en_ben", "Our dog sleeps under the table.", clone=True),
    Dialogue(Line("en_ada", "Did you hear the owl?"), Line("en_ben", "Yes, it woke me up.")),
    Dialogue(Line("en_cleo", "Where is the blue cup?"), Line("en_ben", "Look behind the bread."), clone=True),
    Line("vi_lan", "Buổi sáng hôm nay trời rất đẹp."),
    Line("vi_minh", "Con mèo ngủ bên cửa sổ."),
    Line("vi_hoa", "Dòng sông chảy qua làng nhỏ."),
    Line("vi_lan", "Mẹ tôi đang nấu cơm trong bếp."),
    Line("vi_minh", "Anh ấy đọc sách mỗi buổi tối."),
    Line("vi_hoa", "Em bé cười khi thấy bà."),
    Line("vi_lan", "Chúng tôi đi chợ từ rất sớm."),
    Line("vi_minh", "Xe buýt đến trễ mười phút."),
    Line("vi_lan", "Hôm qua trời mưa cả ngày.", clone=True),
    Line("vi_minh", "Tôi thích uống trà nóng.", clone=True),
    Dialogue(Line("vi_lan", "Bạn ăn cơm chưa?"), Line("vi_minh", "Tôi vừa ăn xong rồi.")),
    Dialogue(Line("vi_hoa", "Nhà ga ở đâu vậy?"), Line("vi_minh", "Đi thẳng rồi rẽ trái."), clone=True),
    Line("ar_salma", "الكتاب على الطاولة الكبيرة."),
    Line("ar_karim", "يشرب جدي القهوة كل يوم."),
    Line("ar_nour", "البحر هادئ هذا المساء."),
    Line("ar_salma", "فتحت أمي باب البيت."),
    Line("ar_karim", "القطار يصل بعد ساعة."),
    Line("ar_nour", "زرعنا شجرة في الحديقة."),
    Line("ar_salma", "نزل المطر في الصباح الباكر."),
    Line("ar_karim", "ذهب أخي إلى المدرسة."),
    Line("ar_salma", "الخبز ساخن وطيب.", clone=True),
    Line("ar_karim", "أحب القراءة قبل النوم.", clone=True),
    Dialogue(Line("ar_salma", "هل رأيت مفتاحي؟"), Line("ar_karim", "نعم، إنه قرب الباب.")),
    Dialogue(Line("ar_nour", "متى تبدأ الرحلة؟"), Line("ar_karim", "تبدأ غدًا صباحًا."), clone=True),
    Line("cmn_mei", "今天天气很好。"),
    Line("cmn_bo", "他每天早上跑步。"),
    Line("cmn_lin", "小猫在窗边睡觉。"),
    Line("cmn_mei", "妈妈在厨房做饭。"),
    Line("cmn_bo", "火车九点出发。"),
    Line("cmn_lin", "河水慢慢流过村子。"),
    Line("cmn_mei", "我们一起去公园。"),
    Line("cmn_bo", "桌子上有一本书。"),
    Line("cmn_mei", "外面下着小雨。", clone=True),
    Line("cmn_bo", "我喜欢喝热茶。", clone=True),
    Dialogue(Line("cmn_mei", "你吃饭了吗？"), Line("cmn_bo", "我刚吃完。")),
    Dialogue(Line("cmn_lin", "车站在哪里？"), Line("cmn_bo", "往前走，再左转。"), clone=True),
)

EVAL: tuple[Line | Dialogue, ...] = (
    Line("en_ada", "The boats come home at dusk."),
    Line("en_ben", "A cold wind shook the door."),
    Line("en_ada", "He reads a page every night.", clone=True),
    Dialogue(Line("en_ada", "Is the soup ready?"), Line("en_ben", "Give it ten minutes.")),
    Line("vi_lan", "Gió thổi nhẹ trên cánh đồng."),
    Line("vi_minh", "Ông tôi trồng hoa trước nhà."),
    Line("vi_lan", "Cửa hàng mở lúc bảy giờ.", clone=True),
    Dialogue(Line("vi_lan", "Mấy giờ rồi anh?"), Line("vi_minh", "Gần tám giờ rồi.")),
    Line("ar_salma", "القمر يضيء الطريق الطويل."),
    Line("ar_karim", "يعمل أبي في المدينة."),
    Line("ar_salma", "العصافير تغني فوق السطح.", clone=True),
    Dialogue(Line("ar_salma", "هل الشاي جاهز؟"), Line("ar_karim", "نعم، تفضلي."), clone=True),
    Line("cmn_mei", "爷爷在院子里种花。"),
    Line("cmn_bo", "商店七点开门。"),
    Line("cmn_mei", "晚上的月亮很圆。", clone=True),
    Dialogue(Line("cmn_mei", "现在几点了？"), Line("cmn_bo", "快八点了。"), clone=True),
)

SPLITS = {"train": TRAIN, "eval": EVAL}
